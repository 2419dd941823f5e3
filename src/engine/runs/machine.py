"""The devices of this machine, and the CPU threads of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from src.engine.memory.gpus import no_gpu, too_few, unavailable
from src.engine.memory.memory import MIB, DeviceMemory
from src.engine.runs.cores import TRIAL_CPUS, cpu_cores


def choose_device(accelerator: str) -> torch.device:
    """The device of trainer.accelerator; auto takes a CUDA GPU, then Apple's, then the CPU. Raises UserError."""
    available = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        accelerator = next(name for name in ("gpu", "mps", "cpu") if available[name])
    if not available[accelerator]:
        raise unavailable(accelerator, f"torch {torch.__version__} finds no device")
    return torch.device({"gpu": "cuda", "mps": "mps", "cpu": "cpu"}[accelerator])


def choose_devices(accelerator: str, devices: int | list[int] | str) -> list[torch.device]:
    """The devices of this machine that a run uses: trainer.accelerator and trainer.devices. Raises UserError.

    A CPU can be any number of devices, to try out a run that is meant for several GPUs.
    """
    kind = choose_device(accelerator).type
    existing = torch.cuda.device_count() if kind == "cuda" else 1
    if devices == "auto":
        devices = existing
    numbers = devices if isinstance(devices, list) else list(range(devices))
    if kind == "cpu":
        if accelerator == "auto" and len(numbers) > 1:
            raise no_gpu(devices)
        return [torch.device("cpu")] * len(numbers)
    if max(numbers) >= existing:
        names = [torch.cuda.get_device_name(number) for number in range(existing)] if kind == "cuda" else [kind]
        raise too_few(devices, existing, ", ".join(names))
    return [torch.device(kind, number) for number in numbers]


def set_threads(threads: int | None, sharers: int = 1) -> None:
    """Sets torch's CPU threads; None leaves its default, all cores or OMP_NUM_THREADS.

    sharers: ranks or pipeline stages that compute on this machine at once and share the threads. With more threads than
    free cores training is many times slower, because they wait for each other at every layer.
    """
    if threads is not None:
        torch.set_num_threads(max(1, threads // sharers))
    elif (sharers > 1 or TRIAL_CPUS in os.environ) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cpu_cores() // sharers))


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one CPU thread: for what is too little to share. Of a step on features each operation takes
    microseconds, in which threads wait for each other, beside another program that computes 20 times as long as they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def begin_peak(device: torch.device) -> bool:
    """Lets `peak_memory_mib` count from here: the process may have had other runs. False where that is not possible."""
    try:
        DeviceMemory(device).reset_peak()
    except OSError:
        return False
    return True


def peak_memory_mib(device: torch.device) -> int:
    """The most memory since `begin_peak`: allocated by torch on a GPU, else resident in the process."""
    return DeviceMemory(device).peak() // MIB
