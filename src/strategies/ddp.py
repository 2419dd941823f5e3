"""strategy=ddp: one process per device, each of which trains its part of every batch; gradients are averaged.

The processes are there already (src/strategies/launching.py, or torchrun) and have met (src/strategies/ranks.py).
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

BROADCAST_BYTES = 250 * 2**20  # at a time, as DistributedDataParallel does it


class Ddp(DDPStrategy):
    """Lightning's, without what it sends in every step beside the gradients.

    Buffers, which are BatchNorm's statistics, are shared before a validation instead of before every forward pass. While
    training nobody reads them, and those of the first process, which are saved, come out the same.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout = timedelta(seconds=timeout_seconds)
        super().__init__(
            cluster_environment=TorchElasticEnvironment(),
            timeout=self.timeout,
            broadcast_buffers=False,
        )

    def on_validation_start(self) -> None:
        dist._broadcast_coalesced(dist.group.WORLD, list(self.lightning_module.buffers()), BROADCAST_BYTES, 0)
