"""The parts into which a network is split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from src.engine.steps.network import Network


class Stage(nn.Module):
    """Some layers in a row, shared with their network. before: applied to the input first, such as normalisation."""

    def __init__(self, layers: Sequence[nn.Module], before: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layers, self.before = nn.ModuleList(layers), before

    @property
    def device(self) -> torch.device:
        """Where its weights are. Every stage has some."""
        return next(self.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        if self.before is not None:
            x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def place(self, device: torch.device) -> None:
        """Replaces weights and buffers by copies on the device; build the optimizer afterwards.

        Module.to changes tensors in place, which fails on the fake tensors that the tests put on GPUs.
        """
        for layer in self.modules():
            for name, weight in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(weight.detach().to(device), weight.requires_grad))
            for name, buffer in layer.named_buffers(recurse=False):
                setattr(layer, name, buffer.to(device))


def stages_of(network: Network) -> list[Stage]:
    """Modules that share the layers of a network whose backbone is split; called one after another they are the network."""
    backbone: Any = network.backbone
    first, *middle, last = backbone.stage_layers()
    return [Stage(first, before=network.normalise), *map(Stage, middle), Stage([*last, network.head])]


def place(network: Network, devices: Sequence[torch.device]) -> None:
    """Moves each stage to its device: the head to the last one, mean and std to the first."""
    for stage, device in zip(stages_of(network), devices, strict=True):
        stage.place(device)
    for name, buffer in network.named_buffers(recurse=False):
        setattr(network, name, buffer.to(devices[0]))
