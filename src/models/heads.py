"""What is trained on top of a backbone: model.head=NAME.

A head is a function that gets those of in_features, outputs, hidden and dropout which it names, and gives a module:
features (B, in_features) -> logits (B, outputs). Your own needs no entry here: model.head=src.my_heads.cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from src.engine.own import build_part

NONE: Mapping[str, Any] = MappingProxyType({})


def linear(in_features: int, outputs: int, dropout: float) -> nn.Module:
    """One layer. The default: with a good backbone the classes are close to linearly separable."""
    layer = nn.Linear(in_features, outputs)
    return nn.Sequential(nn.Dropout(dropout), layer) if dropout > 0 else layer


def mlp(in_features: int, outputs: int, hidden: int, dropout: float) -> nn.Module:
    """A hidden layer of `hidden` units. For images far from ImageNet and a backbone that stays frozen."""
    return nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))


def append(in_features: int, outputs: int) -> nn.Module:
    """One layer behind the backbone's own classifier, whose 1000 ImageNet logits are the features, as often taught in
    lectures: 1000 * outputs weights are trained. The names in KEEP_CLASSIFIER get a backbone with its classifier."""
    return nn.Linear(in_features, outputs)


HEADS = {"linear": linear, "mlp": mlp, "append": append}
KEEP_CLASSIFIER = ("append",)


def build_head(
    name: str, in_features: int, outputs: int, hidden: int, dropout: float, options: Mapping[str, Any] = NONE
) -> nn.Module:
    """The head with random weights. hidden: units of a hidden layer; dropout: before the last layer, in training.
    options: further arguments of an own head."""
    given = {"in_features": in_features, "outputs": outputs, "hidden": hidden, "dropout": dropout}
    return build_part("model.head", name, HEADS, given, options, nn.Module)
