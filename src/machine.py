"""Which device the work is done on."""

from __future__ import annotations

import os
import sys

import torch

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


def cpu_cores() -> int:
    """The cores this process may use, which on a shared machine are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int | None) -> None:
    """CPU threads of torch; None leaves its default, all cores or OMP_NUM_THREADS.

    More threads than free cores are not a little but many times slower: they wait for each other at every layer.
    """
    if threads is not None:
        torch.set_num_threads(threads)


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
