"""What is trained on top of a backbone: model.head=NAME.

A head of your own is a function like those below, with its name in HEADS and in the options of `head` in src/config.py. It
gets features (B, in_features) and gives logits (B, outputs).
"""

from __future__ import annotations

from torch import nn


def linear(in_features: int, outputs: int, hidden: int, dropout: float) -> nn.Module:
    """One layer. The default: with a good backbone the classes are close to linearly separable."""
    layer = nn.Linear(in_features, outputs)
    return nn.Sequential(nn.Dropout(dropout), layer) if dropout > 0 else layer


def mlp(in_features: int, outputs: int, hidden: int, dropout: float) -> nn.Module:
    """A hidden layer of `hidden` units. For images far from ImageNet and a backbone that stays frozen."""
    return nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))


def append(in_features: int, outputs: int, hidden: int, dropout: float) -> nn.Module:
    """One layer behind the backbone's own classifier, whose 1000 ImageNet logits are the features, as often taught in
    lectures: 1000 * outputs weights are trained. The names in KEEP_CLASSIFIER get a backbone with its classifier."""
    return nn.Linear(in_features, outputs)


HEADS = {"linear": linear, "mlp": mlp, "append": append}
KEEP_CLASSIFIER = ("append",)


def build_head(name: str, in_features: int, outputs: int, hidden: int, dropout: float) -> nn.Module:
    """The head with random weights. hidden: units of a hidden layer; dropout: before the last layer, in training."""
    return HEADS[name](in_features, outputs, hidden, dropout)
