"""Which device the work is done on."""

from __future__ import annotations

import os

import torch

from src.cores import TRIAL_CPUS, cpu_cores
from src.device_memory import CpuMemory
from src.gpus import no_gpu, too_few, unavailable


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

    Of a CPU there can be any number, which all are the same one: for trying out what is meant for several GPUs.
    """
    kind = choose_device(accelerator).type
    there = torch.cuda.device_count() if kind == "cuda" else 1
    if devices == "auto":
        devices = there
    numbers = devices if isinstance(devices, list) else list(range(devices))
    if kind == "cpu":
        if accelerator == "auto" and len(numbers) > 1:
            raise no_gpu(devices)
        return [torch.device("cpu")] * len(numbers)
    if max(numbers) >= there:
        names = [torch.cuda.get_device_name(number) for number in range(there)] if kind == "cuda" else [kind]
        raise too_few(devices, there, ", ".join(names))
    return [torch.device(kind, number) for number in numbers]


def set_threads(threads: int | None, sharers: int = 1) -> None:
    """CPU threads of torch; None leaves its default, all cores or OMP_NUM_THREADS. sharers: how many processes, or
    stages of a network, compute on this machine at once and get a part of the threads each.

    More threads than free cores are not a little but many times slower: they wait for each other at every layer.
    """
    if threads is not None:
        torch.set_num_threads(max(1, threads // sharers))
    elif (sharers > 1 or TRIAL_CPUS in os.environ) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cpu_cores() // sharers))


def begin_peak(device: torch.device) -> bool:
    """Has `peak_memory_mib` count from here: the process may have had other runs. False where that is not possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CpuMemory().reset_peak()
    except OSError:  # no Linux, or a container whose /proc cannot be written to
        return False
    return True


def peak_memory_mib(device: torch.device) -> int:
    """The most memory since `begin_peak`: on a GPU what torch allocated there, else what the process had resident."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else CpuMemory().peak()
    return peak // 2**20
