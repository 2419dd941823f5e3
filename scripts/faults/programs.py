"""The interface of the two programs under test, `Project` (this project's command line) and `Plain`
(scripts/baselines/plain_lightning.py), so that each row is written once.

Both train a small network on three classes of 18 images for three epochs of five steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from scripts.faults.injecting import Fault, armed
from tests import conftest, warm

PHOTOS = {"apple": 18, "pear": 18, "plum": 18}


@dataclass
class Done(conftest.Done):
    """How a command ended. code: as subprocess reports it; None if the command timed out and was killed."""

    seconds: float

    def end(self) -> str:
        """For messages: the exit code and the last line printed."""
        lines = [line for line in self.text.strip().splitlines() if line.strip()] or [""]
        how = "timed out" if self.code is None else f"exit code {self.code}"
        return f"{how}: {lines[-1][:160]}"


def check(holds: object, message: str) -> None:
    """Raises AssertionError if the promise is broken. An assert would vanish under `python -O`."""
    if not holds:
        raise AssertionError(message)


def on_this_machine(seconds: float) -> float:
    """Time limits are meant for an idle core: stretches them by the machine's load, at most fivefold."""
    return seconds * min(max(1.0, 1.5 * os.getloadavg()[0] / os.cpu_count()), 5.0)


@dataclass(frozen=True)
class Settings:
    """Settings of a run that rows choose."""

    epochs: int = 3
    workers: int = 0
    devices: int = 1
    lr: float = 0.003
    timeout_seconds: float | None = None
    save_every: int | None = None
    keep_batchnorm: bool = False
    root: str = "photos"
    words: Sequence[str] = ()  # further overrides, of Project
    flags: Sequence[str] = ()  # further flags, of Plain


class Program:
    """A program in its own folder with images. train() starts or continues a run; its settings are the fields of Settings."""

    module: str
    photos_in: tuple[str, ...]  # subfolders that hold the class folders
    validation_of_epoch_2: int  # number of the first validation step of the second epoch

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder.resolve(), cache.resolve()
        if not self.folder.exists():
            self.write_photos(self.folder / "photos")

    # Each program's own

    def words(self, run: str, **settings: Any) -> list[str]:
        """The command line of a run."""
        return self.words_of(run, Settings(**settings))

    def words_of(self, run: str, asked: Settings) -> list[str]:
        raise NotImplementedError

    def write_photos(self, root: Path, classes: dict[str, int] = PHOTOS) -> Path:
        raise NotImplementedError

    def path(self, run: str = "run") -> Path:
        """The run's folder."""
        raise NotImplementedError

    def checkpoints(self, run: str = "run") -> Path:
        raise NotImplementedError

    def digests(self, run: str) -> dict[str, str]:
        """SHA-256 of everything that must be equal in an exact repetition."""
        raise NotImplementedError

    def trained_to_the_end(self, done: Done) -> bool:
        """Whether its output reports the third epoch."""
        raise NotImplementedError

    def classes(self, run: str) -> list[str]:
        """Classes of the trained model."""
        raise NotImplementedError

    @staticmethod
    def read(file: str | Path) -> np.ndarray | None:
        """Pixels (H, W, 3) as the network sees the file; None if the file is refused."""
        raise NotImplementedError

    # Shared

    def class_folder(self, name: str) -> Path:
        """Folder of the class's training images."""
        return self.folder / "photos" / self.photos_in[0] / name

    def train(
        self,
        *faults: Fault,
        run: str = "run",
        seconds: float = 120,
        environ: dict[str, str] | None = None,
        file_limit: int | None = None,
        peak: str | None = None,
        **settings: Any,
    ) -> Done:
        """seconds: time limit, after which the program is killed (Done.code is None). Other options: see `armed`."""
        state = armed(faults, environ, file_limit, peak)
        return self.command(self.module, *self.words(run, **settings), environment=state, seconds=seconds)

    def command(
        self, module: str, *words: str, environment: dict[str, str] | None = None, seconds: float = 120
    ) -> Done:
        """`python -m module words...` in the folder; environment: what `armed` returned."""
        began = time.monotonic()
        if environment:
            module, words = "scripts.faults.victim", (module, *words)
        variables = warm.command_environment() | (environment or {})
        try:
            done = warm.run(module, words, self.folder, variables, seconds)
        except subprocess.TimeoutExpired:
            return Done(None, "", "", time.monotonic() - began)
        return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    def start(
        self, *faults: Fault, run: str = "run", environ: dict[str, str] | None = None, **settings: Any
    ) -> subprocess.Popen[str]:
        """The same in a fresh process, leader of its own process group, without waiting for its end."""
        return self.start_command(self.module, *self.words(run, **settings), environment=armed(faults, environ))

    def start_command(
        self, module: str, *words: str, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.faults.victim", module, *words],
            cwd=self.folder,
            env=warm.command_environment() | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
        )

    def finish(self, process: subprocess.Popen[str], seconds: float = 120) -> Done:
        """Waits for a process that `start` returned."""
        began = time.monotonic()
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            return Done(None, out, err, time.monotonic() - began)
        return Done(process.returncode, out, err, time.monotonic() - began)

    def undisturbed(self, **settings: Any) -> dict[str, str]:
        """Digests of an undisturbed run with these settings; trained once and cached."""
        file = self.cache / f"{self._key(settings)}.json"
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                whole = type(self)(file.with_suffix(""), self.cache)
                done = whole.train(run="whole", **settings)
                check(done.code == 0, f"the undisturbed run failed; {done.end()}")
                file.write_text(json.dumps(whole.digests("whole")))
        return json.loads(file.read_text())

    def undisturbed_folder(self, **settings: Any) -> Path:
        """Checkpoints of the undisturbed run."""
        return type(self)(self.cache / self._key(settings), self.cache).checkpoints("whole")

    def _key(self, settings: dict[str, Any]) -> str:
        text = json.dumps([type(self).__name__, settings], sort_keys=True)
        return f"{type(self).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def check_killed(self, done: Done) -> None:
        check(done.code == -signal.SIGKILL, f"the fault did not happen; {done.end()}")

    def check_continues_exactly(
        self, *faults: Fault, run: str = "run", like: dict | None = None, **settings: Any
    ) -> Done:
        """Repeats the command; it must succeed with the bits of the undisturbed run. like: that run's settings, if others."""
        done = self.train(*faults, run=run, **settings)
        check(done.code == 0, f"the repeated command failed; {done.end()}")
        self.check_exact(run, **(settings if like is None else like))
        return done

    def check_exact(self, run: str = "run", **settings: Any) -> None:
        expected, found = self.undisturbed(**settings), self.digests(run)
        other = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        kinds = sorted({name.partition(":")[0] for name in other})
        check(not other, f"not exact: {len(other)} of {len(expected)} digests differ, of {', '.join(kinds)}")

    def steps_of_last(self, run: str = "run") -> int:
        return torch.load(self.checkpoints(run) / "last.ckpt", map_location="cpu", weights_only=True)["global_step"]

    def processes(self, named: bytes = b"") -> list[int]:
        """Processes whose working directory is the folder, and whose command line contains `named`."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if not entry.name.isdigit() or (entry / "cwd").readlink() != self.folder:
                    continue
                line = (entry / "cmdline").read_bytes()  # empty for a zombie
                if line and named in line:
                    found.append(int(entry.name))
        return found

    def check_nobody_left(self, seconds: float = 10, named: bytes = b"") -> None:
        """No process is left after so many seconds; a loader process checks every 5 s whether its trainer is alive."""
        until = time.monotonic() + on_this_machine(seconds)
        while left := self.processes(named):
            check(time.monotonic() < until, f"{len(left)} processes are left behind")
            time.sleep(0.1)

    def end_processes(self) -> None:
        for process in self.processes():
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)


def tensors_of(file: Path) -> dict[str, str]:
    """{name: SHA-256} of every tensor and number in a checkpoint's weights, optimizer and schedules."""
    found: dict[str, str] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for place, inner in enumerate(value):
                walk(inner, f"{name}.{place}")
        else:
            content = value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
            found[name] = hashlib.sha256(content).hexdigest()

    check(file.exists(), f"{file.name} is missing")
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        walk(checkpoint.get(part, {}), f"{file.name}:{part}")
    return found


def weights_of(file: Path) -> torch.Tensor:
    """All weights and buffers of a checkpoint as one float64 vector."""
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    return torch.cat([tensor.double().flatten() for tensor in state.values()])
