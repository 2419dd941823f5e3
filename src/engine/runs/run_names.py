"""The names of runs and sweeps. A name is one or more plain parts, and the run's folder is runs_dir/name."""

from __future__ import annotations

import os
import secrets
from datetime import datetime
from itertools import count
from pathlib import Path, PurePosixPath

from src.engine.commands.user_command import corrected, typed_name
from src.engine.runs.errors import UserError
from src.engine.runs.files import cannot_write
from src.engine.runs.text import printable

LONGEST = 200  # bytes of a part; most file systems take 255, and the files beside it need a few more


def claim(runs_dir: Path, name: str | None) -> Path:
    """The path of the run's folder. Without a name the folder is made here, so that no other run can get it."""
    if name is not None:
        path = runs_dir / check_name(name, str(runs_dir))
        _refuse_inside_another(path, runs_dir)
        if (path / "fold_0/config.yaml").exists():
            raise UserError(
                f"name={printable(name)} is the name of a run of folds",
                where=str(path.absolute()),
                why="its folder holds the runs of data.folds, and no run of its own",
                fix=corrected(f"name={free_name(path)}"),
            )
        return path
    while True:
        path = runs_dir / new_name()
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_write(path, error, corrected("runs_dir=~/runs")) from error


def new_name() -> str:
    """A name for a run: date, time and four random hex digits, so that two runs of one second differ."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(2)}"


def free_name(path: Path) -> str:
    """The run's name with the first number from 2 that no other run has, below the parts that the user typed."""
    typed = PurePosixPath(typed_name() or "")
    if path.name != typed.name == path.parent.name:  # a fold's run, below the folder of that name
        path = path.parent
    number = next(number for number in count(2) if not path.with_name(f"{path.name}-{number}").exists())
    return str(typed.parent / f"{path.name}-{number}")


def check_name(name: str, runs_dir: str) -> str:
    """The name. Raises UserError unless its parts are plain: a run must not write outside of runs_dir."""
    parts = name.split("/")
    if all(map(_is_plain, parts)):
        return name
    kept = [part for part in (part.replace("\0", "").lstrip(".")[:50] for part in parts) if _is_plain(part)]
    outside = os.path.isabs(name) or not {".", ".."}.isdisjoint(parts)  # noqa: PTH117
    folder = Path(runs_dir, name.replace("\0", "")).parent
    raise UserError(
        f"name={printable(name)} {'leads out of runs_dir' if outside else 'is not the name of a folder'}",
        why="the folder of a run is runs_dir/name, of one or more plain parts: not empty, not ~, no dot in front, not too long",
        fix=corrected(f"name={kept[-1] if kept else 'first'}", f"runs_dir={folder}")
        if outside
        else corrected(f"name={'/'.join(kept) or 'first'}"),
    )


def _is_plain(part: str) -> bool:
    if part in ("", "~") or part.startswith(".") or "\0" in part:
        return False
    return part == Path(part).name and len(os.fsencode(part)) <= LONGEST


def _refuse_inside_another(path: Path, runs_dir: Path) -> None:
    """Raises UserError for a run's folder that lies in that of another run, whose files it would mix with."""
    for parent in path.parents:
        if parent == runs_dir or parent == parent.parent:
            return
        if (parent / "config.yaml").exists():
            raise UserError(
                f"name={printable(path.relative_to(runs_dir))} lies in the folder of the run {printable(parent.name)}",
                where=str(parent.absolute()),
                why="a run writes and removes files in its folder",
                fix=corrected(f"name={path.name}"),
            )
