"""strategy=ddp: one process per device, each of which trains its part of every batch; gradients are averaged.

The processes are there already (src/engine/processes/launching.py, or torchrun) and have met (src/engine/processes/ranks.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

# torch 2.13 renamed it. With the new name the buffers are still sent once, when the module is wrapped, as parameters are.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


class Ddp(DDPStrategy):
    """Lightning's, without what it sends in every step beside the gradients.

    Buffers, which are BatchNorm's statistics, are shared before a validation instead of before every forward pass. While
    training nobody reads them, and those of the first process, which are saved, come out the same.

    DistributedDataParallel is around the module's forward only (compute), not around its training step.
    settings: of DistributedDataParallel.
    """

    def __init__(self, timeout_seconds: float, **settings: Any) -> None:
        self.timeout = timedelta(seconds=timeout_seconds)
        super().__init__(cluster_environment=TorchElasticEnvironment(), timeout=self.timeout)
        self.settings = settings
        self.wrapper: DistributedDataParallel | None = None  # None: the gradients of this process stay its own
        self.communicate: Callable[..., torch.futures.Future] | None = None  # a communication hook of every wrapper

    def configure_ddp(self) -> None:
        """Wraps the module, anew whenever other parameters learn: DistributedDataParallel looks once, when it is made, at
        which gradients are to be averaged (Lightning issue 20340)."""
        self.wrapper = None  # the old one goes first, and its hooks on the parameters with it
        self.wrapper = DistributedDataParallel(
            self.lightning_module,
            device_ids=self.determine_ddp_device_ids(),
            **{_SYNC_BUFFERS: False},
            **self.settings,
        )
        if self.communicate is not None:
            self.wrapper.register_comm_hook(None, self.communicate)

    def compute(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> logits (B, outputs), whose backward pass averages the gradients."""
        module = self.lightning_module if self.wrapper is None else self.wrapper
        assert module is not None
        return module(images)

    @torch.no_grad()
    def on_validation_start(self) -> None:
        """All processes take the buffers of the first."""
        buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.lightning_module.buffers():
            buffers.setdefault(buffer.dtype, []).append(buffer)
        for group in buffers.values():  # one message for all of a type
            values = torch.cat([buffer.flatten() for buffer in group])
            dist.broadcast(values, 0)
            for buffer, new in zip(group, values.split([buffer.numel() for buffer in group]), strict=True):
                buffer.copy_(new.view_as(buffer))

    def teardown(self) -> None:
        self.wrapper = None
        super().teardown()
