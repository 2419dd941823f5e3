"""Which device the work is done on."""

from __future__ import annotations

import os
import sys

import torch

from src.cores import TRIAL_CPUS, cpu_cores
from src.errors import ExitCode, UserError


def choose_device(accelerator: str) -> torch.device:
    """The device of trainer.accelerator; auto takes a CUDA GPU, then Apple's, then the CPU. Raises UserError."""
    available = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        accelerator = next(name for name in ("gpu", "mps", "cpu") if available[name])
    if not available[accelerator]:
        kind = "CUDA" if accelerator == "gpu" else "Apple"
        raise UserError(
            f"trainer.accelerator={accelerator}, but this machine has no {kind} GPU that torch can use",
            why=f"torch {torch.__version__} finds no device; on a GPU machine `nvidia-smi` shows whether the driver works",
            fix="python -m src.train trainer.accelerator=cpu",
            code=ExitCode.UNAVAILABLE,
        )
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
            raise UserError(
                f"trainer.devices={_typed(devices)}, but this machine has no GPU that torch can use",
                why="one CPU is one device, however many cores it has; several can be tried out on it, slowly",
                fix=[
                    "nvidia-smi",
                    f"python -m src.train strategy=ddp trainer.accelerator=cpu trainer.devices={_typed(devices)}",
                ],
                code=ExitCode.UNAVAILABLE,
            )
        return [torch.device("cpu")] * len(numbers)
    if max(numbers) >= there:
        raise UserError(
            f"trainer.devices={_typed(devices)}, but this machine has {there} GPU{'s' if there > 1 else ''}",
            where=", ".join(torch.cuda.get_device_name(number) for number in range(there)) if kind == "cuda" else kind,
            why="devices are counted from 0; CUDA_VISIBLE_DEVICES, where it is set, hides the others",
            fix=f"python -m src.train strategy=ddp trainer.devices={there}",
            code=ExitCode.UNAVAILABLE,
        )
    return [torch.device(kind, number) for number in numbers]


def _typed(devices: int | list[int] | str) -> str:
    """As it is typed: a list without spaces."""
    return str(devices).replace(" ", "")


def set_threads(threads: int | None, sharers: int = 1) -> None:
    """CPU threads of torch; None leaves its default, all cores or OMP_NUM_THREADS. sharers: how many processes, or
    stages of a network, compute on this machine at once and get a part of the threads each.

    More threads than free cores are not a little but many times slower: they wait for each other at every layer.
    """
    if threads is not None:
        torch.set_num_threads(max(1, threads // sharers))
    elif (sharers > 1 or TRIAL_CPUS in os.environ) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cpu_cores() // sharers))


def peak_memory_mib(device: torch.device) -> int | None:
    """The most memory used so far: on a GPU what torch allocated there, else what the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return used // 2**20 if sys.platform == "darwin" else used // 2**10
