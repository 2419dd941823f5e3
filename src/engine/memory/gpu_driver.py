"""NVIDIA's driver: the use of a whole GPU by all processes. A reading takes milliseconds, so there is one a second at most.

torch.cuda.utilization tells one of the three numbers, from the same library; the memory of other processes it does not.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)


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
