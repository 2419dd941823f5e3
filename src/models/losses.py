"""The loss of a task, and what its logits mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


class ClassificationLoss(torch.nn.Module):
    """Cross-entropy of (B, C) logits, or binary cross-entropy of (B, 1) logits; a mean over the batch.

    class_weights: one factor per class, or None. An image weighs as much as its class: the loss is the weighted mean of the
    images' cross-entropies. torch's own weight= is not used, since it also multiplies each class's term of the smoothed
    target: the smoothing mass then falls on the rare classes, and a common class is trained to be called a rare one.
    label_smoothing: share of the target spread evenly over the classes (Szegedy et al., 2016), while training only: what
    is measured is the plain loss.
    """

    def __init__(self, task: str, class_weights: list[float] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.task, self.label_smoothing = task, label_smoothing
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if self.task == "binary":  # one logit z tells the two classes apart as the logits (0, z) do
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        smoothing = self.label_smoothing if self.training else 0.0
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        weights = self.class_weights[labels]
        return (each * weights).sum() / weights.sum()

    def weight(self, labels: torch.Tensor) -> torch.Tensor | int:
        """What the mean over these labels is divided by: their number, or the sum of their classes' weights."""
        return len(labels) if self.class_weights is None else self.class_weights[labels].sum()


def with_telling_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, to the bit. One that is nan or inf has gradients of nan, which reach every process that averages them:
    without this a loss of inf may have finite ones."""
    return loss * (1 + 0 * loss.detach())


def probabilities(logits: torch.Tensor, task: str) -> torch.Tensor:
    """(B, C) probabilities of (B, C) logits, or (B, 2) of a single logit: that of class 1 second."""
    if task == "multiclass":
        return logits.float().softmax(1)
    second = logits.float().sigmoid()
    return torch.cat([1 - second, second], 1)


def predicted_classes(logits: torch.Tensor, task: str) -> torch.Tensor:
    """int64 (B,)."""
    return logits.argmax(1) if task == "multiclass" else (logits[:, 0] > 0).long()


# How many times an image of the largest class an image of a rare class weighs at most (data.class_weights=balanced). Inverse
# frequency alone makes a lottery of a class with one image, which then weighs 171 times one of 171: docs/uneven.md has numbers.
LARGEST_WEIGHT = 10


def class_weights(counts: Sequence[int], form: str) -> list[float] | None:
    """One weight per class, inverse to its count, 1 on average over the images; None for form none.

    counts: training images of each class; none weighs as much as one. form: inverse as it is (scikit-learn's 'balanced'), or
    balanced, which goes no further than LARGEST_WEIGHT times the weight of the largest class.
    """
    if form == "none":
        return None
    least = max(1, max(counts) / LARGEST_WEIGHT) if form == "balanced" else 1
    raw = [1 / max(count, least) for count in counts]
    mean = sum(weight * count for weight, count in zip(raw, counts, strict=True)) / sum(counts)
    return [weight / mean for weight in raw]
