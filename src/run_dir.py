"""A run is a folder: its name, its lock, its provenance, and what becomes of it when the run ends.

run.py opens the folder of a run. Its files are written by src/files.py, an older run's settings are read by
src/run_settings.py. What is in it: README.md, 'A run's folder'.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from src.errors import ExitCode, Terminated, UserError
from src.files import cannot_write, locked, remove_leftovers, write_json, write_text
from src.plain_values import check, limited, read_json
from src.run_names import check_name, free_name, new_name, refuse_inside_another
from src.run_settings import flat, refuse_other_settings, stored_settings
from src.text import printable, shell_word
from src.user_command import corrected, shell_command

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "pillow", "timm", "ray")
# Exit codes of a command that was refused: nothing was computed, and nothing in the folder is worth keeping.
REFUSALS = (ExitCode.USAGE, ExitCode.CONFIG, ExitCode.DATA, ExitCode.NO_INPUT, ExitCode.UNAVAILABLE)
# What a run writes before its first step, and every later start of the run writes again.
BEFORE_THE_FIRST_STEP = (
    *("config.yaml", "environment.json", "result.json", "split.csv", "train.log", "rank*.log"),
    *("model_summary.txt", "memory.csv", "batch_size.json", "tensorboard/events*", "tensorboard/hparams.yaml"),
)
_opened: list[Path] = []  # the folder that this process writes


def claim(runs_dir: Path, name: str | None) -> Path:
    """The path of the run's folder. Without a name the folder is made here, so that no other run can get it."""
    if name is not None:
        path = runs_dir / check_name(name, str(runs_dir))
        refuse_inside_another(path, runs_dir)
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


@dataclass(frozen=True)
class _Finished:
    """What is read of the result.json of a run that finished."""

    state: str = limited(options=("finished",))
    metrics: dict[str, float | None]
    best_epoch: int
    weights: str
    epochs: int
    steps: int
    wall_seconds: float


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
        """Makes or takes up the folder. config: the run's whole config as plain values. writes: False in the processes of a
        run that only look at the folder which the first process has.

        Raises UserError if another process writes there, or if it holds a run that made a step and has another config, or
        may not be continued (resume: 'never'). Whatever ends the block is noted in result.json (state finished,
        interrupted or failed); the folder of a command that was refused is removed again.
        """
        if not writes:
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
        with ExitStack() as held:
            try:
                (path / "checkpoints").mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(path / ".lock", busy))
            except OSError as error:  # among others a disk that may only be read by now
                raise cannot_write(path, error, corrected("runs_dir=~/runs")) from error
            folder = cls(path, config)
            folder._take_up(resume)
            _opened[:] = [path]
            try:
                yield folder
            except BaseException as error:
                folder._note_end(error)
                raise
            _opened.clear()

    def _take_up(self, resume: str) -> None:
        before = self.path / "config.yaml"
        if before.exists() and (made_a_step(self.path) or not (self.path / "environment.json").exists()):
            if resume == "never":
                raise UserError(
                    f"a run named {self.path.name} exists already",
                    where=str(self.path),
                    why="resume=never forbids to continue it",
                    fix=corrected(f"name={free_name(self.path)}"),
                )
            refuse_other_settings(self.path, self.config)
        elif not before.exists() or flat(stored_settings(self.path)) != flat(self.config):
            # A run of other settings that never made a step gives its name back: nothing of it is lost.
            if before.exists():
                lists = (self.path / name for name in ("error.log", "bad_images.txt", "copies.txt"))
                for file in (*_written_before_the_first_step(self.path), *lists):
                    file.unlink(missing_ok=True)
            write_json(self.path / "environment.json", environment())
            write_text(before, yaml.safe_dump(self.config, sort_keys=False))
        for folder in (self.path, self.checkpoints, self.model):
            remove_leftovers(folder)
        if self.result() is None:
            self._note({"state": "running"})

    def _note_end(self, error: BaseException) -> None:
        """What ended the run is kept in result.json. A command that was refused leaves no folder, unless the folder holds
        more than every start writes again: a list that the message names, a step."""
        name = self.config.get("name") or self.path.name
        single = (
            self.path.absolute() == Path(self.config.get("runs_dir", ""), name).absolute()
        )  # a sweep keeps its jobs'
        if isinstance(error, UserError) and error.code in REFUSALS and single and not made_a_step(self.path):
            again = {self.path / ".lock", *_written_before_the_first_step(self.path)}
            if all(path in again or (path.is_dir() and not path.is_symlink()) for path in self.path.rglob("*")):
                _opened.clear()
                shutil.rmtree(self.path, ignore_errors=True)
                for parent in self.path.parents[: name.count("/")]:
                    with suppress(OSError):  # other runs are in it
                        parent.rmdir()
                return
        if read_result(self.path).get("state") != "finished":
            stopped = isinstance(error, KeyboardInterrupt | SystemExit | Terminated)
            self._note({"state": "interrupted" if stopped else "failed", "error": f"{type(error).__name__}: {error}"})

    def result(self) -> dict[str, Any] | None:
        """result.json of a run that finished, else None."""
        result = read_result(self.path)
        try:
            check(_Finished(**{knob.name: result.get(knob.name) for knob in fields(_Finished)}))
        except ValueError:
            return None
        return result

    def note_death(self, error: UserError) -> None:
        """What a run whose first process was killed could not note itself."""
        if read_result(self.path).get("state") == "running":
            self._note({"state": "failed", "error": f"{type(error).__name__}: {error}"})

    def finish(self, report: Callable[[dict[str, Any]], None] = lambda result: None, **result: Any) -> dict[str, Any]:
        """Writes result.json: the end of the run, for programs. It is the last file, so a run that is finished has all.

        report: makes the page of the result. Raises OSError.
        """
        finished = self._signed({"state": "finished", **result})
        report(finished)
        write_json(self.path / "result.json", finished)
        return finished

    def _note(self, result: dict[str, Any]) -> None:
        with suppress(OSError):  # a full disk must not hide the error that is on its way
            write_json(self.path / "result.json", self._signed(result))

    def _signed(self, result: dict[str, Any]) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.started, 2)
        return result | {"name": self.path.name, "command": shell_command(), "wall_seconds": seconds}


def note_opened(path: Path) -> None:
    """The folder is this process's too: of several processes the first opens it, and the others learn of it."""
    _opened[:] = [path]


def opened() -> Path | None:
    """The folder of the run that this process writes, or that an error ended: where the error's traceback goes."""
    return _opened[0] if _opened else None


def made_a_step(path: Path) -> bool:
    """Whether the folder of a run holds what a training step leaves: a checkpoint, whole or not, a row of metrics, a result.

    Where it does not, nothing is lost if another run takes its name.
    """
    metrics = path / "metrics.csv"
    if metrics.exists() and len(metrics.read_bytes().splitlines()) > 1:
        return True
    return (
        any(path.glob("checkpoints/*.ckpt*"))
        or (path / "model").exists()
        or read_result(path).get("state") == "finished"
    )


def remove_if_nothing_ran(sweep: Path) -> None:
    """Removes the folder of a sweep whose jobs were all refused before they wrote anything."""
    if all(path.name == "multirun.yaml" or (path.is_dir() and not path.is_symlink()) for path in sweep.rglob("*")):
        shutil.rmtree(sweep, ignore_errors=True)


def _written_before_the_first_step(path: Path) -> list[Path]:
    return [file for pattern in BEFORE_THE_FIRST_STEP for file in path.glob(pattern)]


def read_result(path: Path) -> dict[str, Any]:
    """result.json of a run's folder; {} where it has none that can be read."""
    try:
        return read_json(path / "result.json")
    except (OSError, ValueError):
        return {}


def refuse_links(folder: Path, *patterns: str) -> None:
    """Raises UserError where a file of the folder that would be written is a link to one outside of it."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise UserError(
                f"{printable(path)} is a link to {printable(os.path.realpath(path))}",
                where=printable(folder.absolute()),
                why="a run writes into its own folder only; somebody who sends you a folder could name your files",
                fix=f"rm {shell_word(path)}",
                code=ExitCode.DATA,
            )


def environment() -> dict[str, Any]:
    """Where the run was made: versions, machine, commit, command."""
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shell_command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return None
