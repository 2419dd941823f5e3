"""The losses of classes and of labels, and their weights in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from src.engine.steps.task_kind import Loss

LossOfEachImage = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits (B, C), labels (B,) -> (B,)


class ClassificationLoss(Loss):
    """Cross-entropy of (B, C) logits, or binary cross-entropy of (B, 1) logits; a mean over the batch.

    class_weights: one factor per class, or None: the loss is the mean of the images' cross-entropies, weighted by their
    classes. torch's own weight= also multiplies each class's term of the smoothed target: the smoothing mass would fall on
    the rare classes, and a common class would be trained to be called a rare one.
    label_smoothing: share of the target spread evenly over the classes (Szegedy et al., 2016), in train mode only.
    own: takes the place of the cross-entropy: logits (B, C), labels (B,) -> the loss of each image (B,).
    """

    class_weights: torch.Tensor | None

    def __init__(
        self,
        class_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        own: LossOfEachImage | None = None,
    ) -> None:
        super().__init__()
        self.label_smoothing, self.own = label_smoothing, own
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if logits.shape[1] == 1:  # one logit z tells the two classes apart as the logits (0, z) do
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        smoothing = self.label_smoothing if self.training else 0.0
        if self.own is not None:
            each = self.own(logits, labels)
            if self.class_weights is None:
                return each.mean()
        elif self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        else:
            each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        weights = self.class_weights[labels]
        return (each * weights).sum() / weights.sum()

    def weight(self, labels: torch.Tensor) -> torch.Tensor | int:
        """The divisor of the mean over these labels: their number, or the sum of their classes' weights."""
        return len(labels) if self.class_weights is None else self.class_weights[labels].sum()


# data.class_weights=balanced: an image of a rare class weighs at most this many times an image of the largest class. By
# inverse frequency alone, a class of one image would weigh 171 times an image of a class of 171: docs/uneven.md has numbers.
LARGEST_WEIGHT = 10


def class_weights(counts: Sequence[int], form: str) -> list[float] | None:
    """One weight per class, inverse to its count, 1 on average over the images; None for form 'none'.

    counts: training images of each class; 0 counts as 1. form: 'inverse' (scikit-learn calls it balanced), or 'balanced',
    which is capped at LARGEST_WEIGHT times the weight of the largest class.
    """
    if form == "none":
        return None
    least = max(1, max(counts) / LARGEST_WEIGHT) if form == "balanced" else 1
    raw = [1 / max(count, least) for count in counts]
    mean = sum(weight * count for weight, count in zip(raw, counts, strict=True)) / sum(counts)
    return [weight / mean for weight in raw]


class MultilabelLoss(Loss):
    """Binary cross-entropy, a mean over images and labels. positive_weights: of each label's images that have it, (names,)."""

    positive_weights: torch.Tensor | None

    def __init__(self, positive_weights: torch.Tensor | None = None, own: LossOfEachImage | None = None) -> None:
        super().__init__()
        self.own = own
        self.register_buffer("positive_weights", positive_weights, persistent=False)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if self.own is not None:
            return self.own(logits, labels).mean()
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits), pos_weight=self.positive_weights)


def positive_weights(labels: torch.Tensor, form: str) -> torch.Tensor | None:
    """Images without a label for each image with it, (names,): data.class_weights=inverse; balanced: LARGEST_WEIGHT at most.
    labels: of the training images (N, names)."""
    if form == "none":
        return None
    positives = labels.sum(0).clamp(min=1)
    weights = (len(labels) - positives) / positives
    return weights.clamp(max=LARGEST_WEIGHT) if form == "balanced" else weights
