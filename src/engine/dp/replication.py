"""A batch in chunks, a replica of the module for each, forward passes in threads, one result: for strategy=dp.

On GPUs by the functions behind torch.nn.DataParallel. torch has none for CPUs: the form for them is for trying out and
testing on any machine what several GPUs would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import parallel
from torch.nn.parallel import comm

Context = Callable[[], AbstractContextManager]  # entered in a thread, around its forward pass


def chunk_sizes(rows: int, devices: int) -> list[int]:
    """Rows of a batch for each device, which differ by one at most. Fewer than devices where one would get a single row,
    which BatchNorm cannot normalise."""
    chunks = max(1, min(devices, rows // 2))
    size, larger = divmod(rows, chunks)
    return [size + 1] * larger + [size] * (chunks - larger)


def on_gpus(
    module: nn.Module, batch: Tensor, sizes: Sequence[int], devices: Sequence[torch.device], context: Context
) -> Tensor:
    """The module's output for the batch, on the first device. A chunk of each size goes to the device beside it."""
    chunks = comm.scatter(batch, devices, sizes)
    replicas = parallel.replicate(module, devices, detach=not torch.is_grad_enabled())

    def forward(replica: nn.Module, chunk: Tensor, device: torch.device) -> Tensor:
        with torch.cuda.device(device), context():
            return replica(chunk)

    return parallel.gather(in_threads(len(devices), forward, replicas, chunks, devices), devices[0])


def on_cpu(module: nn.Module, batch: Tensor, sizes: Sequence[int], context: Context) -> Tensor:
    """The same on one CPU, whose cores work together on one replica after another: side by side they would be no faster,
    and draw their dropout from the CPU's one generator in an order that changes.

    As on GPUs the first replica shares the module's buffers, and the others' are lost.
    """
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))

    def forward(number: int, chunk: Tensor) -> Tensor:
        with context():
            copies = {
                name: tensor.view_as(tensor) if number == 0 else tensor.clone() for name, tensor in tensors.items()
            }
            return functional_call(module, copies, (chunk,))

    return torch.cat(in_threads(1, forward, range(len(sizes)), batch.split(sizes)))


def in_threads(threads: int, forward: Callable[..., Tensor], *arguments: Sequence) -> list[Tensor]:
    """Waits for all, and raises the first one's error as it is: torch's parallel_apply makes another, which tells less."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(forward, *arguments))
