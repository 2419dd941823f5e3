"""What the logits of a task stand for: a loss, classes and probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from src.engine.own import own_object, owner_errors, wrong_result

LossOfEachImage = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits (B, C), labels (B,) -> (B,)


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


def own_loss(name: str, options: Mapping[str, Any], num_classes: int) -> LossOfEachImage:
    """model.loss=src.my_losses.focal: a function of logits, labels and the options, or a class that is made with the options
    and called with logits and labels. Raises UserError unless it gives one loss per image, which is what keeps a batch in
    parts or over several devices equal to the whole."""
    key, logits, labels = "model.loss", torch.zeros(2, num_classes), torch.tensor([0, 1])
    part = own_object(key, name)
    with owner_errors(key, name):
        own = part(**options) if isinstance(part, type) else partial(part, **options)
        each = own(logits, labels)
    if not isinstance(each, torch.Tensor) or each.shape != labels.shape:
        found = (
            f"a result of shape {tuple(each.shape)}" if isinstance(each, torch.Tensor) else f"a {type(each).__name__}"
        )
        raise wrong_result(key, name, f"the loss of each image: shape (2,) for logits {tuple(logits.shape)}", found)
    return own
