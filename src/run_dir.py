"""A run is a folder: its name, its lock, its provenance, and files written so that a crash leaves the old one whole.

run.py opens the folder of a run; evaluate and predict read one. What is in it: README.md, 'A run's folder'.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from filelock import FileLock, Timeout

from src.errors import ExitCode, Terminated, UserError
from src.user_command import shell_command

log = logging.getLogger(__name__)

# Settings that may change when a run is continued: they say where and how, not what is computed.
FREE_TO_CHANGE = (
    *("name", "runs_dir", "resume", "data.num_workers", "logger", "trainer.threads", "trainer.accelerator"),
    *("checkpoint.every_n_steps", "checkpoint.every_n_minutes", "checkpoint.background", "memory", "oom"),
    *("strategy", "trainer.devices", "trainer.num_nodes", "model.split_at"),
)
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "pillow", "timm", "ray")


def new_name() -> str:
    """A name for a run: date, time and four random hex digits, so that two runs of one second differ."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(2)}"


def claim(runs_dir: Path, name: str | None) -> Path:
    """The path of the run's folder. Without a name the folder is made here, so that no other run can get it."""
    if name is not None:
        return runs_dir / name
    while True:
        path = runs_dir / new_name()
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise _cannot_make(path, error) from error


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

        Raises UserError if another process writes there, if it holds a run of another config, or if it exists and
        resume is 'never'. Whatever ends the block is noted in result.json (state finished, interrupted or failed).
        """
        if not writes:
            yield cls(path, config)
            return
        _make(path)
        lock = FileLock(path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is writing the run {path.name}",
                where=str(path),
                why="two writers in one folder would spoil each other's checkpoints",
                fix="wait for it to end, or give this run another name: python -m src.train name=" + new_name(),
                code=ExitCode.BUSY,
            ) from None
        try:
            folder = cls(path, config)
            folder._take_up(resume)
            try:
                yield folder
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt | SystemExit | Terminated)
                folder._note(
                    {"state": "interrupted" if stopped else "failed", "error": f"{type(error).__name__}: {error}"}
                )
                raise
        finally:
            lock.release()

    def _take_up(self, resume: str) -> None:
        before = self.path / "config.yaml"
        if before.exists():
            if resume == "never":
                raise UserError(
                    f"a run named {self.path.name} exists already",
                    where=str(self.path),
                    why="resume=never forbids to continue it",
                    fix=f"python -m src.train name={self.path.name}-2",
                )
            _refuse_other_config(self.path, yaml.safe_load(before.read_text(encoding="utf-8")), self.config)
        else:
            write_text(before, yaml.safe_dump(self.config, sort_keys=False))
            write_json(self.path / "environment.json", environment())
        for leftover in self.path.rglob("*.tmp"):  # of a process that was killed while it wrote; we hold the lock
            leftover.unlink(missing_ok=True)
        if self.result() is None:
            self._note({"state": "running"})

    def result(self) -> dict[str, Any] | None:
        """result.json of a run that finished, else None."""
        path = self.path / "result.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return result if result.get("state") == "finished" else None

    def note_death(self, error: UserError) -> None:
        """What a run whose first process was killed could not note itself."""
        path = self.path / "result.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["state"] == "running":
            self._note({"state": "failed", "error": f"{type(error).__name__}: {error}"})

    def finish(self, **result: Any) -> dict[str, Any]:
        """Writes result.json: the end of the run, for programs."""
        return self._note({"state": "finished", **result})

    def _note(self, result: dict[str, Any]) -> dict[str, Any]:
        result |= {
            "name": self.path.name,
            "command": shell_command(),
            "wall_seconds": round(time.monotonic() - self.started, 2),
        }
        with suppress(OSError):  # a full disk must not hide the error that is on its way
            write_json(self.path / "result.json", result)
        return result


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise _cannot_make(path, error) from error


def _cannot_make(path: Path, error: OSError) -> UserError:
    return UserError(
        f"the run folder {path} cannot be made: {error.strerror}",
        where=str(path.absolute()),
        why="every result of the run goes there",
        fix="python -m src.train runs_dir=another/folder",
        code=ExitCode.CANNOT_WRITE,
    )


def _refuse_other_config(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    old_flat, new_flat = flat(old), flat(new)
    changed = [key for key in {**old_flat, **new_flat} if old_flat.get(key) != new_flat.get(key)]
    changed = [key for key in changed if not any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)]
    if changed:
        shown = [f"{key}: {old_flat.get(key)} there, {new_flat.get(key)} now" for key in changed[:5]]
        raise UserError(
            f"the run {path.name} was made with other settings",
            where=str(path / "config.yaml"),
            why="\n".join([*shown, f"and {len(changed) - 5} more"] if len(changed) > 5 else shown),
            fix=f"give this run another name: python -m src.train name={path.name}-2",
        )


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data.batch_size': 64, ...} of nested dicts with text keys; other values, dicts with number keys too, stay whole."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value and all(isinstance(inner, str) for inner in value):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def read_run(path: Path, command: str) -> dict[str, Any]:
    """The config of an existing run folder; command: src.evaluate or such, for the message. Raises UserError."""
    file = path / "config.yaml"
    if not file.is_file():
        known = sorted((run.parent for run in path.parent.glob("*/config.yaml")), key=lambda run: run.stat().st_mtime)
        raise UserError(
            f"run={path} is not the folder of a run",
            where=str(path.absolute()),
            why="it has no config.yaml" + ("" if known else f", and {path.parent.absolute()} holds no run either"),
            fix=[f"python -m {command} run={run}" for run in known[-1:-3:-1]] or "python -m src.train name=first",
            code=ExitCode.NO_INPUT,
        )
    return yaml.safe_load(file.read_text(encoding="utf-8"))


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


def write_atomically(path: Path, write: Callable[[BinaryIO], object], keep_old_as: Path | None = None) -> None:
    """Writes beside the target, syncs, then renames: a reader or a crash finds the old file or the new one, whole.

    The temporary file is in the target's folder, since a rename is atomic on one file system only. keep_old_as: the name
    that the old file gets; a crash between the two renames leaves the old file under that name and the new one not yet.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_old_as is not None and path.exists():
            path.replace(keep_old_as)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # makes the rename itself durable; Windows has no such call
        handle = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A CSV file with one header line; UTF-8, comma, RFC 4180 quoting."""
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv as numbers; cells without a value are left out."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
