"""What strategy=dp is made of: a batch in chunks, a copy of the network for each, forward in threads, one result.

On GPUs these are the functions behind torch.nn.DataParallel. torch has none for CPUs; the form for them here is for trying
out and testing on any machine what several GPUs would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from operator import call
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import parallel
from torch.nn.parallel import comm

Forward = Callable[[Tensor], Tensor]  # of a replica


class Engine(Protocol):
    """How the work is shared between devices of one kind."""

    def scatter(self, batch: Tensor, sizes: Sequence[int], devices: Sequence[torch.device]) -> Sequence[Tensor]:
        """The rows of a batch (B, ...) in chunks of these sizes, each on a device."""

    def replicate(self, module: nn.Module, devices: Sequence[torch.device]) -> Sequence[nn.Module]:
        """A copy of the module on each device. The first shares its buffers; of all, gradients go to the module's weights.

        A copy's weights are no Parameters: its parameters() is empty.
        """

    def apply(
        self, forwards: Sequence[Forward], chunks: Sequence[Tensor], devices: Sequence[torch.device]
    ) -> Sequence[Tensor]:
        """Each forward with its chunk, outside of this thread. Waits for all, and raises the first one's error as it is."""

    def gather(self, outputs: Sequence[Tensor], device: torch.device) -> Tensor:
        """The outputs of the chunks as those of the batch, (B, ...) on the device."""


def engine_for(device: torch.device) -> Engine:
    """The engine for devices of this kind."""
    return CpuEngine() if device.type == "cpu" else GpuEngine()


def chunk_sizes(rows: int, devices: int) -> list[int]:
    """Rows of a batch for each device, which differ by one at most. Fewer than devices where one would get a single row,
    which BatchNorm cannot normalise."""
    chunks = max(1, min(devices, rows // 2))
    return [rows // chunks + (chunk < rows % chunks) for chunk in range(chunks)]


class GpuEngine:
    """torch's own functions, but for apply: torch's makes a new error, which tells less than the one that was raised."""

    def scatter(self, batch: Tensor, sizes: Sequence[int], devices: Sequence[torch.device]) -> Sequence[Tensor]:
        return comm.scatter(batch, devices, sizes)

    def replicate(self, module: nn.Module, devices: Sequence[torch.device]) -> Sequence[nn.Module]:
        return parallel.replicate(module, devices, detach=not torch.is_grad_enabled())

    def apply(
        self, forwards: Sequence[Forward], chunks: Sequence[Tensor], devices: Sequence[torch.device]
    ) -> Sequence[Tensor]:
        def on_device(forward: Forward, chunk: Tensor, device: torch.device) -> Tensor:
            with torch.cuda.device(device):
                return forward(chunk)

        with ThreadPoolExecutor(len(devices)) as threads:
            return list(threads.map(on_device, forwards, chunks, devices))

    def gather(self, outputs: Sequence[Tensor], device: torch.device) -> Tensor:
        return parallel.gather(outputs, device)


class CpuEngine:
    """The same on one CPU, whose cores work together on one replica after another.

    Side by side they would be no faster, and draw their dropout from the CPU's one generator in an order that changes.
    """

    def scatter(self, batch: Tensor, sizes: Sequence[int], devices: Sequence[torch.device]) -> Sequence[Tensor]:
        return batch.split(sizes)

    def replicate(self, module: nn.Module, devices: Sequence[torch.device]) -> Sequence[nn.Module]:
        return [_replica(module, shared=number == 0) for number in range(len(devices))]

    def apply(
        self, forwards: Sequence[Forward], chunks: Sequence[Tensor], devices: Sequence[torch.device]
    ) -> Sequence[Tensor]:
        with ThreadPoolExecutor(1) as thread:
            return list(thread.map(call, forwards, chunks))

    def gather(self, outputs: Sequence[Tensor], device: torch.device) -> Tensor:
        return torch.cat(outputs)


def _replica(module: nn.Module, shared: bool) -> nn.Module:
    """What torch.nn.parallel.replicate makes for one device. shared: whether its tensors are views instead of copies."""
    tensors = chain(module.parameters(), module.buffers())
    copies = {tensor: tensor.view_as(tensor) if shared else tensor.clone() for tensor in tensors}
    replicas = {layer: layer._replicate_for_data_parallel() for layer in module.modules()}
    for layer, replica in replicas.items():
        replica._modules = {name: replicas.get(child) for name, child in layer._modules.items()}
        replica._buffers = {name: copies.get(buffer) for name, buffer in layer._buffers.items()}
        for name, weight in layer._parameters.items():
            setattr(replica, name, copies.get(weight))
    return replicas[module]
