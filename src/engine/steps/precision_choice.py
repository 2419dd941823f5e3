"""precision=auto: bf16 where this machine is quicker with it, which is measured and not read off a name; else fp32.

CPUs with AMX or AVX512-BF16 and GPUs since 2020 compute up to four times as fast in bf16; others emulate it. fp16 is never
chosen: it needs loss scaling, which leaves out steps.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import nn

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import write_json
from src.engine.runs.plain_values import read_json
from src.engine.runs.text import printable
from src.engine.steps.precision import autocast, check_precision

log = logging.getLogger(__name__)

QUICKER = 0.8  # share of fp32's time from which on bf16 pays for its rounding
TIMED = 3  # passes, after one that is not


def choose_precision(folder: Path, device: torch.device) -> str:
    """The precision that the run of this folder chose when it began, or chooses now and keeps in precision.json."""
    file = folder / "precision.json"
    if file.exists():
        return _kept(file)
    share = seconds_of_a_step("bf16", device) / seconds_of_a_step("fp32", device) if _is_possible(device) else None
    chosen = "bf16" if share is not None and share < QUICKER else "fp32"
    why = "this device has no bf16" if share is None else f"a step in bf16 takes {share:.2f} times as long as in fp32"
    log.info(f"precision=auto: {chosen} ({why})")
    write_json(file, {"name": chosen, "bf16_share": share})
    return chosen


def _kept(file: Path) -> str:
    try:
        name = read_json(file)["name"]
        if name not in ("fp32", "bf16"):
            raise ValueError(f"{str(name)[:40]} is not a precision")
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{printable(file)} cannot be read: {printable(str(error)[:200])}",
            where=printable(file.absolute()),
            why="it says which precision the run chose when it began",
            fix=["copy it back from a backup", corrected("precision=fp32")],
            code=ExitCode.DATA,
        ) from error
    return name


def _is_possible(device: torch.device) -> bool:
    if device.type not in ("cpu", "cuda"):
        return False  # mps: a mixed precision that nobody here has measured
    try:
        check_precision("bf16", device)
    except UserError:
        return False
    return True


def seconds_of_a_step(name: str, device: torch.device) -> float:
    """The quickest of a few passes, forwards and backwards, through layers as networks for images have them."""
    with torch.random.fork_rng(devices=[]):  # new layers draw their weights
        layers = nn.Sequential(
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 256, 1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)),
        )
    layers.to(device)
    images = torch.ones(8, 64, 56, 56, device=device).to(memory_format=torch.channels_last)
    times = []
    for _ in range(1 + TIMED):
        began = time.perf_counter()
        with autocast(name, device):
            total = layers(images).float().sum()
        total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
