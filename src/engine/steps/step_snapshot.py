"""What a step changes before it is known whether it counts: src/engine/steps/out_of_memory.py and non_finite.py undo it."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn

BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class StepSnapshot:
    """Buffers and torch's random states, as keep() found them.

    Only modules in training mode change their buffers. Which these are is the same for an epoch: make a new one for each.
    """

    def __init__(self, module: L.LightningModule, device: torch.device) -> None:
        self.trains_batchnorm = any(isinstance(m, BATCHNORM) and m.training for m in module.modules())
        self._module = module
        self._generators: list[tuple[Callable, Callable]] = [(torch.get_rng_state, torch.set_rng_state)]
        if device.type == "cuda":  # of all GPUs: stages and replicas are on others
            self._generators.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
        elif device.type != "cpu":
            backend = torch.get_device_module(device)
            self._generators.append((backend.get_rng_state, backend.set_rng_state))
        self._buffers: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}  # one call copies all of a kind
        for layer in module.modules():
            for buffer in layer.buffers(recurse=False) if layer.training else ():
                self._buffers.setdefault((buffer.device, buffer.dtype), []).append(buffer)

    @torch.no_grad()
    def keep(self) -> None:
        self._kept = [torch.cat([buffer.flatten() for buffer in buffers]) for buffers in self._buffers.values()]
        self._random = [get() for get, _ in self._generators]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts buffers and random states back, and clears the gradients."""
        for buffers, kept in zip(self._buffers.values(), self._kept, strict=True):
            for buffer, values in zip(buffers, kept.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(values.view_as(buffer))
        for (_, put), state in zip(self._generators, self._random, strict=True):
            put(state)
        self._module.zero_grad()
