"""strategy=dp: several devices in one process, each of which takes a chunk of every batch (docs/multi_gpu.md).

In every step the network is copied to the devices; each replica runs forward with its chunk in a thread of its own; and the
logits are gathered on the first device, where loss, metrics and optimizer are. The backward pass goes the same way back and
adds up the gradients on the first device.

The result is that of one device up to rounding, but for layers that look at the whole batch: BatchNorm in training mode
normalises each chunk by itself, and only the first device's statistics are kept (freeze.batchnorm=keep makes it exact). GPUs
draw the same dropout for the first image of each chunk, for the second, and so on, since all are seeded alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from src.engine.dp.replication import Context, chunk_sizes, on_cpu, on_gpus


class DataParallel(SingleDeviceStrategy):
    """To Lightning a strategy of one device, the first. Only compute, (B, ...) -> (B, ...), knows the others.

    The module stays as it is, so checkpoints have the keys they always have. In a replica `self` is a copy, whose
    parameters() is empty; what it assigns is lost.
    """

    strategy_name = "dp"

    def __init__(self) -> None:
        super().__init__()
        self.parallel_devices: list[torch.device] = []  # Lightning puts them here

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0]

    def compute(self, batch: Tensor) -> Tensor:
        """The module's forward pass, by all devices."""
        module = self.lightning_module
        assert module is not None
        sizes = chunk_sizes(len(batch), len(self.parallel_devices))
        if len(sizes) == 1:
            return module(batch)
        if self.root_device.type == "cpu":
            return on_cpu(module, batch, sizes, self._settings_of_this_thread())
        return on_gpus(module, batch, sizes, self.parallel_devices[: len(sizes)], self._settings_of_this_thread())

    def _settings_of_this_thread(self) -> Context:
        """Gradients, inference mode and autocast are thread-local: torch's parallel_apply forgets the dtype of autocast, so
        that bf16 would become fp16."""
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        @contextmanager
        def context() -> Iterator[None]:
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(gradients),
                self.precision_plugin.forward_context(),
            ):
                yield

        return context
