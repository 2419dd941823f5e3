"""A program that a fault happens to. Two have this interface, so that a row is written once: `Project`, this project's
command line, and `Plain`, scripts/baselines/plain_lightning.py.

Both train a small network on three classes of 18 images, three epochs of five steps.
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
    """How a command ended. code: as of subprocess; None where it was still running after its time and was killed."""

    seconds: float

    def end(self) -> str:
        """For messages: the exit code and the last line printed."""
        lines = [line for line in self.text.strip().splitlines() if line.strip()] or [""]
        how = "still running after its time" if self.code is None else f"exit code {self.code}"
        return f"{how}: {lines[-1][:160]}"


def check(holds: object, message: str) -> None:
    """Raises AssertionError: the promise is broken. Not an assert, since `python -O` would leave the rows without any."""
    if not holds:
        raise AssertionError(message)


def on_this_machine(seconds: float) -> float:
    """A promise of seconds is one for a free core: where others compute, all takes longer."""
    return seconds * min(max(1.0, 1.5 * os.getloadavg()[0] / os.cpu_count()), 5.0)


@dataclass(frozen=True)
class Settings:
    """What a row may ask of a run."""

    epochs: int = 3
    workers: int = 0
    devices: int = 1
    lr: float = 0.003
    timeout_seconds: float | None = None
    save_every: int | None = None
    keep_batchnorm: bool = False
    root: str = "photos"
    words: Sequence[str] = ()  # further ones of this project
    flags: Sequence[str] = ()  # further ones of the plain script


class Program:
    """A program in an empty folder with its images.

    train() runs it to its end, and goes on where there is a run. Settings that both have are keywords: workers, devices,
    epochs, lr, timeout_seconds, save_every, keep_batchnorm, root; `words` are Project's alone, `flags` Plain's.
    """

    module: str
    photos_in: tuple[str, ...]  # below the folder of images
    validation_of_epoch_2: int  # which validation step is its first

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder.resolve(), cache.resolve()
        if not self.folder.exists():
            self.write_photos(self.folder / "photos")

    # What differs

    def words(self, run: str, **settings: Any) -> list[str]:
        """The command line of a run."""
        return self.words_of(run, Settings(**settings))

    def words_of(self, run: str, asked: Settings) -> list[str]:
        raise NotImplementedError

    def write_photos(self, root: Path, classes: dict[str, int] = PHOTOS) -> Path:
        raise NotImplementedError

    def path(self, run: str = "run") -> Path:
        """The folder that the run writes."""
        raise NotImplementedError

    def checkpoints(self, run: str = "run") -> Path:
        raise NotImplementedError

    def digests(self, run: str) -> dict[str, str]:
        """SHA-256 of everything that an exact repetition has the same."""
        raise NotImplementedError

    def trained_to_the_end(self, done: Done) -> bool:
        """Whether it made its third epoch, as it says."""
        raise NotImplementedError

    def classes(self, run: str) -> list[str]:
        """That the trained model knows."""
        raise NotImplementedError

    @staticmethod
    def read(file: str | Path) -> np.ndarray | None:
        """The pixels (H, W, 3) that the network gets of a file; None where it is refused."""
        raise NotImplementedError

    # What both do

    def class_folder(self, name: str) -> Path:
        """Where images of that class are, which train takes."""
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
        """seconds: after which it is killed (Done.code is None then). The others: see `armed`."""
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
        """The same in a fresh process that is not waited for. It leads a process group of its own."""
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
        """Waits for the end of what `start` began."""
        began = time.monotonic()
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            return Done(None, out, err, time.monotonic() - began)
        return Done(process.returncode, out, err, time.monotonic() - began)

    def undisturbed(self, **settings: Any) -> dict[str, str]:
        """The digests of a run that nothing happened to; made once for the same settings."""
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
        """The checkpoints of that run."""
        return type(self)(self.cache / self._key(settings), self.cache).checkpoints("whole")

    def _key(self, settings: dict[str, Any]) -> str:
        text = json.dumps([type(self).__name__, settings], sort_keys=True)
        return f"{type(self).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def check_killed(self, done: Done) -> None:
        check(done.code == -signal.SIGKILL, f"the fault did not happen; {done.end()}")

    def check_continues_exactly(
        self, *faults: Fault, run: str = "run", like: dict | None = None, **settings: Any
    ) -> Done:
        """The same command again ends well, with the bits of the undisturbed run. like: its settings, where they differ."""
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
        """Those that run in the folder, with that in their command lines."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if not entry.name.isdigit() or (entry / "cwd").readlink() != self.folder:
                    continue
                line = (entry / "cmdline").read_bytes()  # none: it has ended, and nobody has asked for its code yet
                if line and named in line:
                    found.append(int(entry.name))
        return found

    def check_nobody_left(self, seconds: float = 10, named: bytes = b"") -> None:
        """A loader process looks every 5 seconds whether its trainer is alive."""
        until = time.monotonic() + on_this_machine(seconds)
        while left := self.processes(named):
            check(time.monotonic() < until, f"{len(left)} processes are left behind")
            time.sleep(0.1)

    def end_processes(self) -> None:
        for process in self.processes():
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)


def tensors_of(file: Path) -> dict[str, str]:
    """{name: SHA-256} of every tensor and number of the weights and the optimizer in a checkpoint."""
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
    """All weights and statistics of a checkpoint in one vector, float64."""
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    return torch.cat([tensor.double().flatten() for tensor in state.values()])
