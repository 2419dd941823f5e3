"""How much memory is in use, read so cheaply that it can be done in every step.

A GPU's allocator and the C library keep counters on the host; reading them waits for no kernel. What only the driver
knows (use of the whole device, other processes) takes milliseconds and is read at most once a second. The callbacks
gpu_memory.py and memory_growth.py are made of these readings. Bytes everywhere; None where a platform cannot tell.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from src.device_memory import available_memory

log = logging.getLogger(__name__)


class Allocator(NamedTuple):
    """torch's memory on one CUDA device, in bytes."""

    allocated: int  # in tensors that are alive
    reserved: int  # taken from the driver: allocated, and the cache of what was freed
    peak: int  # the most that was allocated since torch.cuda.reset_peak_memory_stats
    allocations: int  # how many pieces are alive; steady from step to step where the bytes are not


def read_allocator(device: torch.device) -> Allocator:
    """The counters of a CUDA device. torch.cuda.memory_allocated and its like sort all hundred of them for each answer."""
    statistics = torch.cuda.memory_stats_as_nested_dict(device)
    allocated = statistics["allocated_bytes"]["all"]
    return Allocator(
        allocated["current"],
        statistics["reserved_bytes"]["all"]["current"],
        allocated["peak"],
        statistics["allocation"]["all"]["current"],
    )


class _Mallinfo2(ctypes.Structure):
    """struct mallinfo2 of glibc >= 2.33, see mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _find_mallinfo2() -> Callable[[], Any] | None:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)  # other C libraries have none
    if function is not None:
        function.restype = _Mallinfo2
    return function


_mallinfo2 = _find_mallinfo2()


def live_bytes(device: torch.device) -> int | None:
    """What is alive of a device's memory: on a GPU in torch's tensors, on a CPU in everything that malloc gave out.

    The CPU's number is that of glibc, over all threads. The resident size would not do: it moves by itself, and does not
    follow what is freed.
    """
    if device.type == "cuda":
        return read_allocator(device).allocated
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    if _mallinfo2 is None:
        return None
    heap = _mallinfo2()
    return heap.uordblks + heap.hblkhd


def resident_bytes() -> int | None:
    """RAM that the process holds now; on macOS the most it ever held; None on Windows."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes(device: torch.device) -> int | None:
    """What could still be allocated on the device: free, and for a GPU also what torch's cache holds."""
    if device.type == "cuda":
        allocator = read_allocator(device)
        return torch.cuda.mem_get_info(device)[0] + allocator.reserved - allocator.allocated
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return available_memory() if sys.platform == "linux" else None


@dataclass(frozen=True)
class DriverReading:
    """What the driver says about a whole GPU."""

    used: int | None = None  # bytes, by all processes
    utilisation: int | None = None  # percent of the last moments in which some kernel ran
    other_processes: int | None = None  # bytes; None also where the driver does not list this process, as in containers


class Driver:
    """NVIDIA's driver, asked about the GPU behind a torch device, at most once in `interval_seconds`."""

    def __init__(self, device: torch.device, interval_seconds: float = 1.0) -> None:
        self.interval_seconds = interval_seconds
        self._next = 0.0
        self._reading = DriverReading()
        self._handle = _driver_handle(device)

    def read(self) -> DriverReading:
        """The last reading, or a new one if that is too old; empty where there is no such driver."""
        now = time.monotonic()
        if self._handle is not None and now >= self._next:
            self._next = now + self.interval_seconds
            self._reading = _ask_driver(self._handle)
        return self._reading


def _driver_handle(device: torch.device) -> Any:
    """The driver's handle of a device, by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not the driver's."""
    import pynvml

    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        pynvml.nvmlInit()
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError_NotFound:
            return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
    except pynvml.NVMLError as error:
        log.info(f"memory    utilisation and other processes of the GPU are not known: {error}")
        return None


def _ask_driver(handle: Any) -> DriverReading:
    import pynvml

    def ask(question: Callable[[Any], Any]) -> Any:
        try:
            return question(handle)
        except pynvml.NVMLError:  # a part of a GPU (MIG) has no utilisation; some systems hide processes
            return None

    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    rates = ask(pynvml.nvmlDeviceGetUtilizationRates)
    processes = ask(pynvml.nvmlDeviceGetComputeRunningProcesses) or []
    by_process = {process.pid: process.usedGpuMemory for process in processes}
    listed = os.getpid() in by_process and None not in by_process.values()
    return DriverReading(
        memory and memory.used,
        rates and rates.gpu,
        sum(used for pid, used in by_process.items() if pid != os.getpid()) if listed else None,
    )
