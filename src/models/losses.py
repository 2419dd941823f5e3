"""The loss of a task, and what its logits mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class ClassificationLoss(torch.nn.Module):
    """Cross-entropy of (B, C) logits, or binary cross-entropy of (B, 1) logits; a mean over the batch.

    class_weights: one factor per class, or None. With them the mean is weighted, as in torch's cross_entropy.
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
        return F.cross_entropy(logits, labels, self.class_weights, label_smoothing=smoothing)

    def weight(self, labels: torch.Tensor) -> torch.Tensor | int:
        """What the mean over these labels is divided by: their number, or the sum of their classes' weights."""
        return len(labels) if self.class_weights is None else self.class_weights[labels].sum()


def probabilities(logits: torch.Tensor, task: str) -> torch.Tensor:
    """(B, C) probabilities of (B, C) logits, or (B, 2) of a single logit: that of class 1 second."""
    if task == "multiclass":
        return logits.float().softmax(1)
    second = logits.float().sigmoid()
    return torch.cat([1 - second, second], 1)


def predicted_classes(logits: torch.Tensor, task: str) -> torch.Tensor:
    """int64 (B,)."""
    return logits.argmax(1) if task == "multiclass" else (logits[:, 0] > 0).long()


def balanced_weights(counts: list[int]) -> list[float]:
    """One weight per class, inverse to its count, 1 on average over the pictures (scikit-learn's 'balanced')."""
    total, classes = sum(counts), len(counts)
    return [total / (classes * count) for count in counts]
