"""Strategies that run the backward pass inside the training step, since micro-batches overlap there.

Lightning's closure is training_step, zero_grad, backward: gradients made in the training step would be erased and made
again. Here they are cleared before it, and what comes after it only calls the hooks; models/classifier.py leaves
zero_grad alone where the strategy has `runs_backward`.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from src.models.losses import with_telling_gradient


class OwnBackward(Strategy):
    """To be mixed into a strategy, before its class; the strategy implements forward_backward."""

    runs_backward = True

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the gradients of the batch's mean loss to the parameters. images: uint8 (B, 3, S, S), labels: (B,).

        Returns the mean loss and the predicted classes (B,), on the device of the labels.
        """
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss, predicted = self.forward_backward(*batch)
        return {"loss": loss, "predicted": predicted}

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The gradients are there: only the hooks around a backward pass are called."""
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as it goes into a backward pass: times the scale of fp16, where there is one."""
        scaler: torch.amp.GradScaler | None = getattr(self.precision_plugin, "scaler", None)
        loss = with_telling_gradient(loss)
        return loss if scaler is None else scaler.scale(loss)
