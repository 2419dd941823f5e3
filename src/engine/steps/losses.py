"""model.loss=focal and logit_adjusted: losses beside the cross-entropy. Each gives the loss of every image, (B,)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError


class Focal(nn.Module):
    """(1 - p) ** gamma * cross-entropy, where p is the probability of the truth: images that the network is sure of, and right
    about, hardly count (Lin et al., 2017, https://arxiv.org/abs/1708.02002). gamma=0 is the cross-entropy.

    Of several labels per image (B, names): the mean over them.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = _not_negative("gamma", gamma)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.is_floating_point():
            each = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
        else:
            each = F.cross_entropy(logits, labels, reduction="none")
        wrong = (1 - torch.exp(-each)).clamp(min=1e-7)  # at 0 the slope of a root (gamma < 1) is not finite
        each = wrong**self.gamma * each
        return each.mean(1) if each.ndim == 2 else each


class LogitAdjusted(nn.Module):
    """Cross-entropy of logits + tau * log(share of the class), in train mode only: the network learns what the image says, and
    the classes' shares are added to it (Menon et al., 2021, https://arxiv.org/abs/2007.07314).

    counts: training images of each class. Without label smoothing, which would give rare classes a target beyond their share.
    """

    shift: Tensor

    def __init__(self, counts: Sequence[int], tau: float = 1.0) -> None:
        super().__init__()
        numbers = torch.tensor(counts).clamp(min=1)
        self.register_buffer("shift", _not_negative("tau", tau) * (numbers / numbers.sum()).log(), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits + self.shift if self.training else logits, labels, reduction="none")


LOSSES = {"focal": Focal, "logit_adjusted": LogitAdjusted}


def _not_negative(option: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        key = f"model.loss_options.{option}"
        raise UserError(f"{key}={value} is out of range", why="it is a number from 0 on", fix=corrected(f"{key}=1.0"))
    return value
