"""The number of GPUs as far as it can be told before torch is imported, and the errors for missing GPUs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from src.engine.commands.user_command import corrected, is_training
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import as_typed

ALONE = ("strategy=single", "trainer.devices=1")
OF_SEVERAL = tuple(f"strategy.{name}" for name in ("timeout_seconds", "port", "sync_batchnorm"))


def check_enough(accelerator: str, devices: int | list[int]) -> None:
    """Raises UserError for several devices if this machine cannot have them; src/engine/runs/machine.py asks torch later."""
    numbers = devices if isinstance(devices, list) else range(devices)
    most = most_gpus()
    if most is None or accelerator not in ("auto", "gpu") or len(numbers) < 2:
        return
    if most == 0:
        raise no_gpu(devices) if accelerator == "auto" else unavailable("gpu", "there is no NVIDIA device in /dev")
    if most and max(numbers) >= most:
        raise too_few(devices, most)


def device_count(trainer: Any) -> int:
    """How many devices a machine uses: trainer.devices of the config as a number."""
    if trainer.devices == "auto":
        import torch  # takes seconds

        return max(1, torch.cuda.device_count()) if trainer.accelerator in ("auto", "gpu") else 1
    return len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices


def most_gpus() -> int | None:
    """An upper bound for the number of GPUs by their files in /dev; None if these do not tell."""
    if sys.platform != "linux" or any(Path("/dev", name).exists() for name in ("kfd", "dxg")):  # AMD, WSL
        return None
    existing = len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "MIG" in visible:
        return None
    if visible is None:
        return existing
    return min(existing, len([number for number in visible.split(",") if number.strip()]))


def unavailable(accelerator: str, why: str) -> UserError:
    """The error for trainer.accelerator=gpu or mps where there is none."""
    key = "trainer.accelerator" if is_training() else "accelerator"
    return UserError(
        f"{key}={accelerator}, but this machine has no {'CUDA' if accelerator == 'gpu' else 'Apple'} GPU that torch can use",
        why=f"{why}; on a GPU machine `nvidia-smi` shows whether the driver works",
        fix=corrected(f"{key}=cpu"),
        code=ExitCode.UNAVAILABLE,
    )


def no_gpu(devices: int | list[int] | str) -> UserError:
    return UserError(
        f"trainer.devices={as_typed(devices)}, but this machine has no GPU that torch can use",
        why="one CPU is one device, however many cores it has; several can be tried out on it, slowly",
        fix=["nvidia-smi", corrected("trainer.accelerator=cpu"), corrected(*ALONE, remove=OF_SEVERAL)],
        code=ExitCode.UNAVAILABLE,
    )


def too_few(devices: int | list[int] | str, existing: int, names: str = "") -> UserError:
    """existing: number of GPUs, with these names."""
    several = existing > 1
    return UserError(
        f"trainer.devices={as_typed(devices)}, but this machine has {existing} {'GPUs' if several else 'GPU'}",
        where=names,
        why="devices are counted from 0; CUDA_VISIBLE_DEVICES, where it is set, hides the others",
        fix=corrected(f"trainer.devices={existing}") if several else corrected(*ALONE, remove=OF_SEVERAL),
        code=ExitCode.UNAVAILABLE,
    )
