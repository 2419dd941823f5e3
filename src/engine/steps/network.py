"""What the engine asks of the network of a run."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """uint8 images (B, 3, S, S), or features (B, F), -> logits (B, outputs). src/models/network.py is one."""

    backbone: nn.Module
    head: nn.Module
    channels_last: bool
    compiled = False  # trainer.compile: whether the backbone's training passes are
    temperature = 1.0  # forward divides the logits by it: model.calibrate

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> what the backbone takes."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> what the backbone gives and the head takes, (B, F)."""
        raise NotImplementedError
