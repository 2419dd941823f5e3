"""What the engine asks of the network of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from src.engine.pipeline.stage import Stage


class Network(nn.Module):
    """uint8 images (B, 3, S, S) -> logits (B, outputs). src/models/network.py is one."""

    backbone: nn.Module
    head: nn.Module
    channels_last: bool

    def stages(self) -> list[Stage]:
        """Of a split network: modules that share its layers; called one after another they are the network."""
        raise NotImplementedError

    def place(self, devices: Sequence[torch.device]) -> None:
        """Moves each stage of a split network to its device."""
        raise NotImplementedError
