"""The run or the model that run= and model= of evaluate, predict and export mean; torch is not imported here.

What is none is answered with the runs that there are: only those that have a model.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from src.errors import ExitCode, UserError
from src.run_dir import read_result
from src.text import path_in, printable, shell_word
from src.user_command import corrected, is_typed

SHOWN = 3


def find_run(text: str) -> Path:
    """The folder of a run whose model/ is written. Raises UserError, which says what the folder is instead."""
    path = path_in(text)
    if (path / "config.yaml").is_file():
        if has_model(path):
            return path
        raise _without_model(path)
    for parent in path.parents:  # its model/, a checkpoint, a file in it
        if (parent / "config.yaml").is_file():
            raise UserError(
                f"run={printable(text)} lies in the folder of a run",
                where=str(path.absolute()),
                why="run= is the run's folder itself",
                fix=corrected(f"run={parent}"),
                code=ExitCode.NO_INPUT,
            )
    if (path / "model.json").is_file():
        raise UserError(
            f"run={printable(text)} is a model/ folder without its run",
            where=str(path.absolute()),
            why="settings and split of the run are not in it; src.predict names classes with it",
            fix=corrected(f"model={path}", remove=["run"])
            if is_typed("images") and not is_typed("format")
            else f"python -m src.predict model={shell_word(path)} images=photos/",
            code=ExitCode.NO_INPUT,
        )
    jobs = _usable(path) if path.is_dir() else []
    if jobs:
        raise UserError(
            f"run={printable(text)} is not the folder of a run but of {len(jobs)} finished runs",
            where=str(path.absolute()),
            why="its jobs are runs of their own; the table and the report of a sweep say which is best",
            fix=_commands(jobs),
            code=ExitCode.NO_INPUT,
        )
    others = _usable(path.parent) or _usable(Path("runs")) or _usable(Path("runs"), "*/*")
    named = [run for run in others if run.name == path.name]
    raise UserError(
        f"run={printable(text)} is not the folder of a run",
        where=str(path.absolute()),
        why="it has no config.yaml" if path.exists() else "there is no such folder",
        fix=_commands(named or others) or "python -m src.train name=first",
        code=ExitCode.NO_INPUT,
    )


def find_model(text: str) -> Path:
    """A model/ folder. Raises UserError for a folder that holds none."""
    path = path_in(text)
    if (path / "model.json").is_file():
        return path
    if has_model(path):
        raise UserError(
            f"model={printable(text)} is the folder of a run",
            where=str(path.absolute()),
            why="model= is the model/ folder in it, wherever it was copied to",
            fix=[corrected(f"model={path / 'model'}"), corrected(f"run={path}", remove=["model"])],
            code=ExitCode.NO_INPUT,
        )
    there = [run / "model" for run in (_usable(path.parent) or _usable(Path("runs")))]
    raise UserError(
        f"{printable(text)} holds no model: model.json is missing",
        where=str(path.absolute()),
        why="a run writes its model/ when it ends; one that was interrupted has none yet",
        fix=[corrected(f"model={model}") for model in there[:SHOWN]] or "python -m src.train name=first",
        code=ExitCode.NO_INPUT,
    )


def has_model(run: Path) -> bool:
    return (run / "model" / "model.json").is_file()


def _without_model(path: Path) -> UserError:
    """A run that is not finished: how it stands, and the command that ends it."""
    result = read_result(path)
    state, command = str(result.get("state", "not finished")), _own_command(result.get("command"))
    why = {
        "running": "it is under way, or was killed; model/ is written at its end",
        "interrupted": "it was interrupted; model/ is written at its end, and the same command continues it",
        "failed": f"it failed: {printable(result.get('error', ''))}",
        "finished": "it finished, and its model/ was moved or deleted since",
    }.get(state, "model/ is written at the end of a run")
    mends = [command] if command and state != "finished" else []
    return UserError(
        f"the run {printable(path.name)} has no model ({printable(state)}): model/model.json is missing",
        where=str((path / "model").absolute()),
        why=why,
        fix=[*mends, *_commands(_usable(path.parent))] or "python -m src.train name=first",
        code=ExitCode.NO_INPUT,
    )


def _own_command(text: object) -> str | None:
    """A command of this program that a result.json names; a text with anything of the shell in it is not passed on."""
    with suppress(ValueError):
        if isinstance(text, str) and text.startswith("python -m src.train ") and shlex.join(shlex.split(text)) == text:
            return text
    return None


def _commands(runs: Sequence[Path]) -> list[str]:
    return [corrected(f"run={run}") for run in runs[:SHOWN]]


def _usable(folder: Path, pattern: str = "*") -> list[Path]:
    """The runs in a folder that have a model, the newest first."""
    runs = [run for run in folder.glob(pattern) if (run / "config.yaml").is_file() and has_model(run)]
    return sorted(runs, key=lambda run: (run / "config.yaml").stat().st_mtime, reverse=True)
