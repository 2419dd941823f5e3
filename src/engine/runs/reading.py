"""Reading last.ckpt, best.ckpt and the like: checked before they are used, and without running code."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from src.engine.commands.user_command import named, shell_command
from src.engine.runs.checksum import damage
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.writing import LAST, PREVIOUS

log = logging.getLogger(__name__)

FOREIGN = "holds code, or is no checkpoint of this run"
MOST_OF_A_HEADER = 4 * 2**20  # bytes: the names of some 30,000 tensors
MOST = 10**12  # more steps, images or epochs than any run counts
DEEPEST = 12  # dictionaries in dictionaries that hold the counters of a position


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU: tensors and plain values, never code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises ValueError, SafetensorError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_OF_A_HEADER:  # 500,000 empty tensors would take half a minute
        raise ValueError(f"its header has {length} bytes")
    return safetensors.torch.load_file(path)


def flaw(path: Path, max_epochs: int | None = None) -> str | None:
    """Why a checkpoint cannot be used ('is damaged (...)'); None if it can.

    max_epochs: of the run that would continue from it; None if only its weights are needed.
    """
    if not path.exists():
        return "is missing"
    if (why := damage(path)) is not None:
        return f"is damaged ({why})"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # the tensors stay on the disk
        return _foreign(content) or (None if max_epochs is None else _no_position(content, max_epochs))
    except Exception:  # torch raises a dozen kinds, with the advice to load the code too; any key may be missing
        return FOREIGN


def _foreign(content: Any) -> str | None:
    if type(content) is not dict:
        return FOREIGN
    weights = content["state_dict"]
    counted = all(type(content[key]) is int and 0 <= content[key] <= MOST for key in ("epoch", "global_step"))
    named_tensors = weights and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()
    )
    return None if counted and named_tensors else FOREIGN


def _no_position(content: dict[str, Any], max_epochs: int) -> str | None:
    """Why Lightning cannot continue from the counters. It believes them: one too high would end the run as if finished."""
    loop = content["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]["total"]
    steps = loop["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
    steps = steps or loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    agree = epochs["processed"] - 1 <= content["epoch"] <= epochs["processed"] <= max_epochs
    agree = agree and steps == content["global_step"] <= batches["ready"] and _counts(loop, DEEPEST)
    lists = all(isinstance(content[key], list) and content[key] for key in ("optimizer_states", "lr_schedulers"))
    return None if agree and lists and isinstance(content["callbacks"], dict) else f"{FOREIGN}: its counters contradict"


def _counts(value: Any, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(_counts(inner, depth - 1) for inner in value.values())
    return isinstance(value, bool | None) or (type(value) is int and 0 <= value <= MOST)


def newest_position(folder: Path, max_epochs: int | None = None) -> Path | None:
    """The checkpoint to continue from, or None if none was written yet. max_epochs: of the run; None: not known.

    Warns if last.ckpt cannot be used and takes the one before it: the steps since then are repeated, with the same result.
    Raises UserError if both cannot be used (DAMAGED; DATA if they are whole and foreign): a silent new start would look
    like success.
    """
    existing = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    broken: list[str] = []
    for path in existing:
        why = flaw(path, max_epochs or MOST)
        if why is None:
            for sentence in broken:
                log.warning(f"{folder / sentence}; {path.name} is taken, and the steps since then are repeated.")
            return path
        broken.append(f"{path.name} {why}")
    if not broken:
        _refuse_to_lose(folder)
        return None
    raise unusable("no checkpoint of this run can be read any more", folder, existing, broken)


def _refuse_to_lose(folder: Path) -> None:
    """For a run without a position: a new start must not overwrite its weights, and must not go unnoticed."""
    best = [path for path in sorted(folder.glob("*.ckpt")) if flaw(path) is None]
    epochs = max((read_checkpoint(path)["epoch"] + 1 for path in best), default=0)
    if epochs > 1:  # weights of the first epoch are written before the first position
        why = f"{best[0].name} has the weights of epoch {epochs}, and a start from nothing would write over them"
        raise unusable(f"the position of this run is gone: there is no {LAST} and no {PREVIOUS}", folder, [], [why])
    rows = folder.parent / "metrics.csv"
    if rows.exists() and len(rows.read_bytes().splitlines()) > 1:
        log.warning(
            f"{folder} holds no position, though the run has trained before: it begins again, with the same result."
        )


def unusable(message: str, folder: Path, paths: list[Path], why: list[str]) -> UserError:
    """The error for a folder in which no checkpoint can be used. why: a line for each."""
    files = [path for path in paths if path.exists()]
    return UserError(
        message,
        where=str(folder),
        why="\n".join(why),
        fix=[
            f"copy the folder {shlex.quote(str(folder))} back from a backup, then repeat: {shell_command()}",
            named(folder.parent.name, "-2") + " # the same run, from the start",
        ],
        code=ExitCode.DATA if files and not any(map(damage, files)) else ExitCode.DAMAGED,
    )
