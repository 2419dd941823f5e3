"""The loss of a batch whose micro-batches a strategy differentiates itself: strategy=model_parallel and pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from src.engine.steps.engine_module import EngineModule, with_telling_gradient


class BatchLoss:
    """labels: of each micro-batch. `of` is called once for each, in order."""

    def __init__(self, module: EngineModule, labels: Sequence[Tensor]) -> None:
        self.module, self.labels, self.shares = module, labels, module.shares_of_loss(labels)
        self.scaler: torch.amp.GradScaler | None = getattr(module.trainer.precision_plugin, "scaler", None)
        self.losses: list[Tensor] = []
        self.logits: list[Tensor] = []

    def of(self, number: int, logits: Tensor) -> Tensor:
        """What is differentiated for a micro-batch: its share of the batch's mean loss, times the scale of fp16."""
        loss = self.module.mean_loss(logits, self.labels[number]) * self.shares[number]
        self.losses.append(loss.detach())
        self.logits.append(logits.detach())
        loss = with_telling_gradient(loss)
        return loss if self.scaler is None else self.scaler.scale(loss)

    def result(self) -> tuple[Tensor, Tensor]:
        """The batch's mean loss, and the logits (B, outputs)."""
        return sum(self.losses, start=torch.zeros_like(self.losses[0])), torch.cat(self.logits)
