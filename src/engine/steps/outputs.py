"""What the logits of a task stand for: a loss, classes and probabilities."""

from __future__ import annotations

import torch


class Loss(torch.nn.Module):
    """logits (B, outputs), labels (B,) -> the mean loss. src/models/losses.py has the classification's."""

    task: str

    def weight(self, labels: torch.Tensor) -> torch.Tensor | int:
        """The divisor of the mean over these labels."""
        raise NotImplementedError


def probabilities(logits: torch.Tensor, task: str) -> torch.Tensor:
    """(B, C) probabilities of (B, C) logits, or (B, 2) of a single logit: that of class 1 second."""
    if task == "multiclass":
        return logits.float().softmax(1)
    second = logits.float().sigmoid()
    return torch.cat([1 - second, second], 1)


def predicted_classes(logits: torch.Tensor, task: str) -> torch.Tensor:
    """int64 (B,)."""
    return logits.argmax(1) if task == "multiclass" else (logits[:, 0] > 0).long()
