"""precision=auto: bf16 where a measurement says that this network is quicker with it on this machine; else fp32.

CPUs with AMX or AVX512-BF16 and GPUs since 2020 compute convolutions up to four times as fast in bf16, but not those of each
channel alone: a CPU that is twice as fast with a ResNet18 takes twice as long with an EfficientNet. Others emulate it. fp16 is
never chosen: it needs loss scaling, which leaves out steps.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from src.engine.commands.user_command import corrected
from src.engine.memory.out_of_memory import is_out_of_memory
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import write_json
from src.engine.runs.plain_values import read_json
from src.engine.runs.task import RunTask
from src.engine.runs.text import printable
from src.engine.steps.network import Network
from src.engine.steps.precision import autocast, check_precision

if TYPE_CHECKING:
    from src.engine.runs.job import Job

log = logging.getLogger(__name__)
Task = TypeVar("Task", bound=RunTask)

QUICKER = 0.8  # share of fp32's time from which on bf16 pays for its rounding
TIMED = 3  # passes, after one that is not
IMAGES = {"cpu": 8, "cuda": 32}  # of a pass: on a GPU fewer would measure how it is started


def with_precision(job: Job, task: Task) -> tuple[Job, Task]:
    """The job and its task with the chosen precision in the place of auto."""
    if job.config.precision.name != "auto":
        return job, task
    size = task.preprocessing.image_size
    name = job.ranks.told_by_first(lambda: choose_precision(job.folder.path, task.network, size, job.device))
    check_precision(name, job.device)  # a run that is continued elsewhere
    config = replace(job.config, precision=replace(job.config.precision, name=name))
    return replace(job, config=config), replace(task, card=replace(task.card, precision=name))


def choose_precision(folder: Path, network: Network, image_size: int, device: torch.device) -> str:
    """The precision that the run of this folder chose when it began, or chooses now and keeps in precision.json."""
    file = folder / "precision.json"
    if file.exists():
        return _kept(file)
    share = bf16_share(network, image_size, device) if _is_possible(device) else None
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


def bf16_share(network: Network, image_size: int, device: torch.device) -> float:
    """How long a pass in bf16 takes, as a share of fp32's time: forwards and backwards, all blocks trained, of a copy."""
    network = copy.deepcopy(network).to(device).train().requires_grad_(True)
    network.compiled = False
    number = IMAGES[device.type]
    while True:
        images = torch.zeros(number, 3, image_size, image_size, dtype=torch.uint8, device=device)
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout
                return seconds_of_a_step("bf16", network, images) / seconds_of_a_step("fp32", network, images)
        except Exception as error:
            if number == 1 or not is_out_of_memory(error):
                raise
            number //= 2


def seconds_of_a_step(name: str, network: Network, images: torch.Tensor) -> float:
    """The quickest of a few passes."""
    times = []
    for _ in range(1 + TIMED):
        began = time.perf_counter()
        with autocast(name, images.device):
            total = network(images).float().sum()
        total.backward()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
