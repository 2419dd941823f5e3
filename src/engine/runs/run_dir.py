"""The life of a run's folder: opened and locked by run.py, ended with a result.json, removed where a command was refused.

What is in it: README.md, 'A run's folder'.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from src.engine.commands.user_command import corrected, shell_command
from src.engine.runs.errors import ExitCode, Terminated, UserError
from src.engine.runs.files import cannot_write, locked, remove_leftovers, write_json, write_text
from src.engine.runs.plain_values import check, limited, read_json
from src.engine.runs.run_names import free_name, new_name
from src.engine.runs.run_settings import flat, refuse_other_settings, stored_settings
from src.engine.runs.text import printable, shell_word

log = logging.getLogger(__name__)

# Exit codes of a refused command: it computed nothing, and nothing in the folder is worth keeping.
REFUSALS = (ExitCode.USAGE, ExitCode.CONFIG, ExitCode.DATA, ExitCode.NO_INPUT, ExitCode.UNAVAILABLE)
# Written before the first step, and again by every later start of the run.
BEFORE_THE_FIRST_STEP = (
    "config.yaml", "environment.json", "result.json", "split.csv", "train.log", "rank*.log", "model_summary.txt",
    "memory.csv", "batch_size.json", "near_duplicates.csv", "doubts.csv", "tensorboard/events*",
    "tensorboard/hparams.yaml", "tracking.json",
)  # fmt: skip
LISTS_OF_MESSAGES = ("error.log", "bad_images.txt", "copies.txt")  # files that an error message names
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "pillow", "timm", "ray")  # of environment.json
_opened: list[Path] = []  # the folder of this process's run


@dataclass(frozen=True)
class _Finished:
    """The part of a finished run's result.json that is read again."""

    metrics: dict[str, float | None]
    best_epoch: int
    weights: str
    epochs: int
    steps: int
    wall_seconds: float
    state: str = limited(options=("finished",))


class RunFolder:
    """The folder of one run while it is written: `with RunFolder.open(path, config) as folder`."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.started = time.monotonic()
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, config: dict[str, Any], resume: str = "auto", *, writes: bool = True
    ) -> Iterator[RunFolder]:
        """Makes the folder, or continues the run in it. Whatever ends the block is noted in result.json (state finished,
        interrupted or failed); the folder of a refused command is removed again.

        config: the run's whole config as plain values. writes: False on ranks other than 0, which only read the folder.
        Raises UserError if another process writes there, and if the run there made a step with another config, or may not
        be continued (resume: 'never').
        """
        if not writes:
            _opened[:] = [path]
            yield cls(path, config)
            return
        _opened.clear()
        refuse_links(path, "*", "*/*")
        busy = UserError(
            f"another process is writing the run {path.name}",
            where=str(path),
            why="two writers in one folder would spoil each other's checkpoints",
            fix=["wait for it to end", corrected(f"name={new_name()}")],
            code=ExitCode.BUSY,
        )
        with ExitStack() as stack:
            try:
                (path / "checkpoints").mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path / ".lock", busy))
            except OSError as error:  # such as a disk that has become read-only
                raise cannot_write(path, error, corrected("runs_dir=~/runs")) from error
            folder = cls(path, config)
            folder._begin(resume)
            _opened[:] = [path]
            try:
                yield folder
            except BaseException as error:
                folder._note_end(error)
                raise
            _opened.clear()

    def _begin(self, resume: str) -> None:
        stored = self.path / "config.yaml"
        if not is_to_continue(self.path, self.config, resume) and (
            not stored.exists() or flat(stored_settings(self.path)) != flat(self.config)
        ):
            if stored.exists():  # a run of other settings that never made a step: nothing of it is lost
                for file in [*_matching(self.path, BEFORE_THE_FIRST_STEP), *_matching(self.path, LISTS_OF_MESSAGES)]:
                    file.unlink(missing_ok=True)
            write_json(self.path / "environment.json", environment())
            write_text(stored, yaml.safe_dump(self.config, sort_keys=False))
        for folder in (self.path, self.checkpoints, self.model):
            remove_leftovers(folder)
        if self.result() is None:
            self._note({"state": "running"})

    def _note_end(self, error: BaseException) -> None:
        if isinstance(error, UserError) and error.code in REFUSALS and self._is_worthless():
            self._remove()
        elif read_result(self.path).get("state") != "finished":
            stopped = isinstance(error, KeyboardInterrupt | SystemExit | Terminated)
            self._note({"state": "interrupted" if stopped else "failed", "error": f"{type(error).__name__}: {error}"})

    @property
    def _name(self) -> str:
        return self.config.get("name") or self.path.name

    def _is_worthless(self) -> bool:
        """Whether every start of the run would write all of the folder's files again. A sweep keeps its jobs' folders."""
        if self.path.absolute() != Path(self.config.get("runs_dir", ""), self._name).absolute() or made_a_step(
            self.path
        ):
            return False
        again = {self.path / ".lock", *_matching(self.path, BEFORE_THE_FIRST_STEP)}
        return all(path in again or _is_folder(path) for path in self.path.rglob("*"))

    def _remove(self) -> None:
        _opened.clear()
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in self.path.parents[: self._name.count("/")]:
            with suppress(OSError):  # it holds other runs
                parent.rmdir()

    def result(self) -> dict[str, Any] | None:
        """result.json of a run that finished, else None."""
        result = read_result(self.path)
        values: dict[str, Any] = {knob.name: result.get(knob.name) for knob in fields(_Finished)}
        try:
            check(_Finished(**values))
        except ValueError:
            return None
        return result

    def note_death(self, error: UserError) -> None:
        """Notes the end of a run whose first process was killed, and could not do it."""
        if read_result(self.path).get("state") == "running":
            self._note({"state": "failed", "error": f"{type(error).__name__}: {error}"})

    def finish(self, report: Callable[[dict[str, Any]], None] = lambda result: None, **result: Any) -> dict[str, Any]:
        """Writes result.json, the end of the run for programs; as the last file, so that a finished run has all of them.

        report: writes the page of the result. Raises OSError.
        """
        finished = self._signed({"state": "finished", **result})
        report(finished)
        write_json(self.path / "result.json", finished)
        return finished

    def _note(self, result: dict[str, Any]) -> None:
        with suppress(OSError):  # a full disk must not hide the error that is being raised
            write_json(self.path / "result.json", self._signed(result))

    def _signed(self, result: dict[str, Any]) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.started, 2)
        return result | {"name": self.path.name, "command": shell_command(), "wall_seconds": seconds}


def opened() -> Path | None:
    """The folder of this process's run, also when an error has just ended it: the traceback goes there."""
    return _opened[0] if _opened else None


def is_to_continue(path: Path, config: dict[str, Any], resume: str) -> bool:
    """Whether a run that has begun to train is in the folder. Raises UserError if it may not be continued with the config."""
    if not (path / "config.yaml").exists() or not (made_a_step(path) or not (path / "environment.json").exists()):
        return False
    if resume == "never":
        raise UserError(
            f"a run named {path.name} exists already",
            where=str(path),
            why="resume=never forbids to continue it",
            fix=corrected(f"name={free_name(path)}"),
        )
    refuse_other_settings(path, config)
    return True


def made_a_step(path: Path) -> bool:
    """Whether a run's folder holds anything of a training step: a checkpoint, whole or not, a row of metrics, a result.

    If not, nothing is lost when another run takes its name.
    """
    metrics = path / "metrics.csv"
    if metrics.exists() and len(metrics.read_bytes().splitlines()) > 1:
        return True
    has_weights = any(path.glob("checkpoints/*.ckpt*")) or (path / "model").exists()
    return has_weights or read_result(path).get("state") == "finished"


def remove_if_nothing_ran(sweep: Path) -> None:
    """Removes the folder of a sweep whose jobs were all refused before they wrote anything."""
    if all(path.name == "multirun.yaml" or _is_folder(path) for path in sweep.rglob("*")):
        shutil.rmtree(sweep, ignore_errors=True)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [file for pattern in patterns for file in folder.glob(pattern)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def read_result(path: Path) -> dict[str, Any]:
    """result.json of a run's folder; {} where there is none that can be read."""
    try:
        return read_json(path / "result.json")
    except (OSError, ValueError):
        return {}


def environment() -> dict[str, Any]:
    """environment.json: where a run was made. git: None outside of a repository."""
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    git = None
    with suppress(OSError, subprocess.SubprocessError):
        git = {"commit": _git("rev-parse", "HEAD"), "changed_files": len(_git("status", "--porcelain").splitlines())}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shell_command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "git": git,
    }


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def refuse_links(folder: Path, *patterns: str) -> None:
    """Raises UserError if a matching file, which the command would write, is a link to one outside of the folder."""
    for path in _matching(folder, patterns):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise UserError(
                f"{printable(path)} is a link to {printable(os.path.realpath(path))}",
                where=printable(folder.absolute()),
                why="a run writes into its own folder only; somebody who sends you a folder could name your files",
                fix=f"rm {shell_word(path)}",
                code=ExitCode.DATA,
            )
