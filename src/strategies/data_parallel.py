"""strategy=dp: several devices in one process, which each take a part of every batch (DataParallel).

In every step the batch is cut into chunks, one for each device; the network is copied to the devices; each copy, a
replica, runs forward with its chunk in a thread of its own; and the logits are gathered on the first device. Loss,
metrics and logs are made there, once, of the whole batch. The backward pass goes the same way back, and adds up the
gradients on the first device, which also holds the optimizer.

Why strategy=ddp is better, even on one machine:

- The first device also has the batch, all logits, the gradients of all and the optimizer: it is full first, while the
  others have room left, and they wait while it works alone.
- Threads share one Python interpreter, whose lock (the GIL) lets one of them at a time start the kernels of its device.
- The whole network is copied to every device in every step, also in validation. ddp keeps a copy on each, and while the
  backward pass still runs it exchanges gradients only.

What to expect of the result: it is that of one device, as far as sums of floats in another order are, but for layers
that look at the whole batch. BatchNorm in training mode normalises each chunk by itself, and only the statistics of the
first device are kept; freeze.batchnorm=keep makes it exact. GPUs also draw the same dropout for the first image of each
chunk, for the second, and so on, since all are seeded alike.
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from src.strategies.replication import Forward, chunk_sizes, engine_for


class DataParallel(SingleDeviceStrategy):
    """To Lightning a strategy of one device, the first. Only the module's forward, (B, ...) -> (B, ...), knows the others.

    The module stays as it is, so checkpoints have the keys they always have. What calls it as self(batch), in training and
    in validation, calls the replicas. In a replica self is a copy, whose parameters() is empty; what it assigns is lost.
    """

    strategy_name = "dp"

    def __init__(self) -> None:
        super().__init__()
        self.parallel_devices: list[torch.device] | None = None  # Lightning puts them here

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0]

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        if len(self.parallel_devices) > 1:
            self._engine = engine_for(self.root_device)
            # Of this object only: its class keeps the real forward, for the replicas.
            self.lightning_module.forward = self._forward

    def teardown(self) -> None:
        vars(self.lightning_module).pop("forward", None)
        super().teardown()

    def _forward(self, batch: Tensor) -> Tensor:
        module = self.lightning_module
        sizes = chunk_sizes(len(batch), len(self.parallel_devices))
        if len(sizes) == 1:
            return type(module).forward(module, batch)
        devices = self.parallel_devices[: len(sizes)]
        chunks = self._engine.scatter(batch, sizes, devices)
        replicas = self._engine.replicate(module, devices)
        outputs = self._engine.apply([self._forward_of(replica) for replica in replicas], chunks, devices)
        return self._engine.gather(outputs, self.root_device)

    def _forward_of(self, replica: nn.Module) -> Forward:
        """With what this thread has set: gradients, inference mode and precision are settings of a thread, and torch gives
        replicas not even the precision's type: bf16 would become fp16."""
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def forward(chunk: Tensor) -> Tensor:
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(gradients),
                self.precision_plugin.forward_context(),
            ):
                return type(replica).forward(replica, chunk)

        return forward
