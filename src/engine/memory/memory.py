"""How much memory of a device is in use, in bytes, read so cheaply that it can be done in every step; None where a platform
cannot tell.

The allocators keep counters on the host, so that a reading waits for no kernel. Only src/engine/memory/gpu_driver.py
knows the use of the whole device.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from src.engine.memory import ram

MIB = 2**20


class Allocator(NamedTuple):
    """torch's memory on one CUDA device."""

    allocated: int  # in live tensors
    reserved: int  # taken from the driver: allocated, and the cache of freed blocks
    peak: int  # the most that was allocated since torch.cuda.reset_peak_memory_stats
    allocations: int  # number of live blocks: steady from step to step even where the bytes are not


def read_allocator(device: torch.device) -> Allocator:
    """The counters of a CUDA device at once; torch.cuda.memory_allocated and its like sort all hundred of them each time."""
    statistics = torch.cuda.memory_stats_as_nested_dict(device)
    allocated = statistics["allocated_bytes"]["all"]
    reserved = statistics["reserved_bytes"]["all"]["current"]
    return Allocator(allocated["current"], reserved, allocated["peak"], statistics["allocation"]["all"]["current"])


def live_bytes(device: torch.device) -> int | None:
    """Memory in use: on a GPU by torch's live tensors, on a CPU by everything that malloc gave out."""
    if device.type == "cuda":
        return read_allocator(device).allocated
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return ram.malloc_bytes()


def available_bytes(device: torch.device) -> int | None:
    """Memory that could still be allocated: free, and on a GPU also the cache of torch's allocator."""
    if device.type == "cuda":
        allocator = read_allocator(device)
        return torch.cuda.mem_get_info(device)[0] + allocator.reserved - allocator.allocated
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return ram.available_ram() if sys.platform == "linux" else None


class DeviceMemory:
    """The memory that training steps need and its peak: torch's on a CUDA device, this process's resident size on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_gpu = device, device.type == "cuda"
        self.name = torch.cuda.get_device_name(device) if self.is_gpu else "the memory of this machine"

    def held(self) -> int:
        """Bytes that this process holds now."""
        return read_allocator(self.device).allocated if self.is_gpu else ram.resident_bytes() or 0

    def usable(self) -> int:
        """Bytes that this process holds or could still get."""
        return self.held() + (available_bytes(self.device) or 0)

    def reset_peak(self) -> None:
        """Lets peak() count from here. Raises OSError where the platform keeps no peak."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            ram.reset_resident_peak()
        else:
            raise OSError(f"{self.device.type} keeps no peak")

    def peak(self) -> int:
        """The most bytes that were held since reset_peak."""
        return read_allocator(self.device).peak if self.is_gpu else ram.resident_peak()


def make_states(optimizer: Optimizer) -> None:
    """Gives the parameters that learn a gradient of zero and the optimizer its states, as after a first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
