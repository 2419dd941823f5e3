"""Reading checkpoints: checked before they are loaded, and without running code."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import torch

from src.checkpoints.checksum import damage
from src.checkpoints.writing import LAST, PREVIOUS
from src.errors import ExitCode, UserError
from src.user_command import named, shell_command

log = logging.getLogger(__name__)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU: tensors and plain values, never code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def newest_position(folder: Path) -> Path | None:
    """The checkpoint to continue from, or None where none was written yet.

    A damaged one is named, and the one before it is taken: the steps since then are repeated, with the same result.
    Raises UserError (DAMAGED) where all are damaged: to start again from nothing would look like success.
    """
    there = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    broken: list[str] = []
    for path in there:
        what = damage(path)
        if what is None:
            return path
        broken.append(f"{path.name}: {what}")
        log.warning(f"{path} is damaged ({what}); the one before it is taken, and the steps since then are repeated.")
    if not broken:
        return None
    raise UserError(
        "no checkpoint of this run can be read any more",
        where=str(folder),
        why="\n".join(broken),
        fix=[
            f"copy the folder {shlex.quote(str(folder))} back from a backup, then repeat: {shell_command()}",
            named(folder.parent.name, "-2") + " # the same run, from the start",
        ],
        code=ExitCode.DAMAGED,
    )
