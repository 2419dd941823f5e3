"""What is said where GPUs are missing, and how many there can be: known before torch is imported and processes start.

src/machine.py, which imports torch, knows the devices themselves.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from src.errors import ExitCode, UserError
from src.text import as_typed
from src.user_command import corrected, is_training

ALONE = ("strategy=single", "trainer.devices=1")
OF_SEVERAL = tuple(f"strategy.{name}" for name in ("timeout_seconds", "port", "sync_batchnorm"))


def check_enough(accelerator: str, devices: int | list[int]) -> None:
    """Raises UserError for several devices that this machine cannot have; otherwise torch is asked later."""
    numbers = devices if isinstance(devices, list) else range(devices)
    most = most_gpus()
    if most is None or accelerator not in ("auto", "gpu") or len(numbers) < 2:
        return
    if most == 0:
        raise no_gpu(devices) if accelerator == "auto" else unavailable("gpu", "there is no NVIDIA device in /dev")
    if most and max(numbers) >= most:
        raise too_few(devices, most)


def most_gpus() -> int | None:
    """No more GPUs than this can be there, by their files in /dev; None where these do not tell."""
    if sys.platform != "linux" or any(Path("/dev", name).exists() for name in ("kfd", "dxg")):  # AMD, WSL
        return None
    there = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "MIG" in visible:
        return None
    return there if visible is None else min(there, len([one for one in visible.split(",") if one.strip()]))


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


def too_few(devices: int | list[int] | str, there: int, names: str = "") -> UserError:
    """names: of the GPUs that are there."""
    fewer = [corrected(f"trainer.devices={there}")] if there > 1 else [corrected(*ALONE, remove=OF_SEVERAL)]
    return UserError(
        f"trainer.devices={as_typed(devices)}, but this machine has {there} GPU{'s' if there > 1 else ''}",
        where=names,
        why="devices are counted from 0; CUDA_VISIBLE_DEVICES, where it is set, hides the others",
        fix=fewer,
        code=ExitCode.UNAVAILABLE,
    )
