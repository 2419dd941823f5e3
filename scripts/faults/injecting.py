"""Faults inside a process that knows nothing of them: something happens at the n-th call of a named function.

The programs have no hooks for tests. `python -m scripts.faults.victim MODULE words...` reads the faults from an environment
variable, puts them around the functions they name as soon as those are imported, and becomes `python -m MODULE words...`.
Processes that it starts (the ranks of ddp, Ray's workers) get them too, through children/sitecustomize.py. No library is
imported here before the program imports it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "FAULTS"  # of the environment: what `armed` returns
CHILDREN = Path(__file__).parent / "children"

# Functions that this project's runs and a plain Lightning script both go through.
STEP = "lightning.pytorch.strategies.strategy:Strategy.training_step"  # of a batch, or of a part of one
VALIDATION_STEP = "lightning.pytorch.strategies.strategy:Strategy.validation_step"
SAVE = "lightning.pytorch.trainer.trainer:Trainer.save_checkpoint"  # the request; the writing may come later
WRITE = "torch:save"
COPY = "shutil:copyfile"  # how Lightning's checkpoint gets from another file system to its place
FETCH = "torch.utils.data._utils.fetch:_MapDatasetFetcher.fetch"  # the images of a batch
OPEN_IMAGE = "PIL.Image:open"


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th call of a function, in every process or in one.

    at: "package.module:Class.function". do: a name in ACTIONS, and its `value`. nth: counted from 1 in each process; to: the
    last call that is hit; None: that one alone; 0: all from there on. after: the call is made first. rank: in this process
    of several; loader: in loader processes only; inside: in calls that come from a function of that name; since: when that
    file is there. once: a file that says that it has happened, so that a process that is started anew is spared.
    """

    at: str
    do: str
    value: Any = None
    nth: int = 1
    to: int | None = None
    after: bool = False
    rank: int | None = None
    loader: bool = False
    inside: str | None = None
    since: str | None = None
    once: str | None = None


def kill(at: str, nth: int = 1, **options: Any) -> Fault:
    return Fault(at, "signal", int(signal.SIGKILL), nth, **options)


def send(number: int, at: str, nth: int = 1, **options: Any) -> Fault:
    """A signal that the process sends to itself: it arrives at that very call."""
    return Fault(at, "signal", int(number), nth, **options)


def slow(at: str, seconds: float, nth: int = 1, to: int | None = 0, **options: Any) -> Fault:
    return Fault(at, "sleep", seconds, nth, to, **options)


def armed(
    faults: Sequence[Fault],
    environ: dict[str, str] | None = None,
    file_limit: int | None = None,
    peak: str | None = None,
) -> dict[str, str]:
    """The environment of a victim. environ: variables that the program sees. file_limit: bytes, RLIMIT_FSIZE. peak: a file
    for the most memory that it had, in KiB."""
    if not (faults or environ or file_limit or peak):
        return {}
    state = {"faults": [asdict(fault) for fault in faults], "environ": environ or {}, "limit": file_limit, "peak": peak}
    return {VARIABLE: json.dumps(state)}


def arm() -> None:
    """Puts the faults of the environment into this process and those that it starts."""
    state = json.loads(os.environ.get(VARIABLE, "{}"))
    if not state:
        return
    os.environ.update(state["environ"])
    tempfile.tempdir = None  # it is remembered, and TMPDIR may be another now
    if state["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (state["limit"], resource.RLIM_INFINITY))
    if state["peak"]:
        atexit.register(_write_peak, Path(state["peak"]).absolute())
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(CHILDREN) not in path:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHILDREN), *path])
    waiting: dict[str, list[Fault]] = {}
    for fault in (Fault(**fields) for fields in state["faults"]):
        module = fault.at.partition(":")[0]
        if module in sys.modules:
            _wrap(sys.modules[module], fault)
        else:
            waiting.setdefault(module, []).append(fault)
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


def _write_peak(file: Path) -> None:
    file.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


class _Finder(MetaPathFinder):
    """Wraps the functions of a module when it has been imported."""

    def __init__(self, waiting: dict[str, list[Fault]]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        faults = self.waiting.pop(name, None)
        if faults is None:
            return None
        spec = next(spec for finder in sys.meta_path if (spec := finder.find_spec(name, path, target)) is not None)
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            for fault in faults:
                _wrap(module, fault)

        spec.loader.exec_module = execute_and_wrap
        return spec


def _wrap(module: ModuleType, fault: Fault) -> None:
    *owners, name = fault.at.partition(":")[2].split(".")
    owner = functools.reduce(getattr, owners, module)
    real, calls = getattr(owner, name), 0

    @functools.wraps(real)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        call = functools.partial(real, *arguments, **keywords)
        if not _is_here(fault):
            return call()
        calls += 1
        last = fault.nth if fault.to is None else fault.to or calls
        if not fault.nth <= calls <= last:
            return call()
        if fault.once is not None:
            if Path(fault.once).exists():
                return call()
            Path(fault.once).touch()
        if fault.after:
            result = call()
            ACTIONS[fault.do](lambda: None, fault.value, arguments)
            return result
        return ACTIONS[fault.do](call, fault.value, arguments)

    setattr(owner, name, wrapped)


def _is_here(fault: Fault) -> bool:
    if fault.loader:
        from torch.utils.data import get_worker_info

        if get_worker_info() is None:
            return False
    if fault.since is not None and not Path(fault.since).exists():
        return False
    if fault.inside is not None and fault.inside not in _callers():
        return False
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))  # Lightning's own launcher sets the second only
    return fault.rank is None or fault.rank == rank


def _callers() -> Iterator[str]:
    """The names of the functions that are under way."""
    frame = sys._getframe()
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


Call = Callable[[], Any]


def _signal(call: Call, number: int, arguments: Sequence[Any]) -> Any:
    os.kill(os.getpid(), number)
    return call()


def _sleep(call: Call, seconds: float, arguments: Sequence[Any]) -> Any:
    time.sleep(seconds)
    return call()


def _raise(call: Call, message: str, arguments: Sequence[Any]) -> Any:
    raise ValueError(message)


def _not_a_number(call: Call, factor: float, arguments: Sequence[Any]) -> Any:
    """The loss times the factor: nan, or inf."""
    return _with_loss(call(), lambda loss: loss * factor)


def _infinite_gradient(call: Call, _: None, arguments: Sequence[Any]) -> Any:
    """The loss is right, and every gradient infinite."""

    def worsened(loss: Any) -> Any:
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    return _with_loss(call(), worsened)


def _with_loss(output: Any, change: Callable[[Any], Any]) -> Any:
    return output | {"loss": change(output["loss"])} if isinstance(output, dict) else change(output)


def _little_memory(call: Call, fits: int, arguments: Sequence[Any]) -> Any:
    """A batch, or a part of one, of more than so many images does not fit."""
    import torch

    images = next(argument for argument in arguments if isinstance(argument, list | tuple))[0]
    if len(images) > fits:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return call()


def _half_written(call: Call, _: None, arguments: Sequence[Any]) -> Any:
    """torch.save dies when half of the file is on the disk. What goes into memory only is not on the disk."""
    target = arguments[1]
    if isinstance(target, io.BytesIO):
        return call()
    whole = io.BytesIO()
    sys.modules["torch"].serialization.save(arguments[0], whole)
    target.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    target.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def _half_copied(call: Call, _: None, arguments: Sequence[Any]) -> Any:
    """shutil.copyfile dies when half of the checkpoint is copied."""
    source, target = Path(arguments[0]), Path(arguments[1])
    if not target.name.endswith(".ckpt"):
        return call()
    target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def _cut_file(call: Call, path: str, arguments: Sequence[Any]) -> Any:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    return call()


def _fill_disk(call: Call, path: str, arguments: Sequence[Any]) -> Any:
    """Writes a file until the disk is full."""
    with contextlib.suppress(OSError), Path(path).open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return call()


def _meet(call: Call, path: str, arguments: Sequence[Any]) -> Any:
    """Says by a file that it has come here, and waits until that is gone: somebody else has something to do meanwhile."""
    Path(path).touch()
    while Path(path).exists():
        time.sleep(0.02)
    return call()


def _answer(call: Call, value: Any, arguments: Sequence[Any]) -> Any:
    """Instead of the function: for guards that are switched off."""
    return value


def _write_in_place(call: Call, _: None, arguments: Sequence[Any]) -> None:
    """Instead of src.files.write_atomically(path, write)."""
    path, write = arguments[:2]
    with path.open("wb") as file:
        write(file)


ACTIONS: dict[str, Callable[[Call, Any, Sequence[Any]], Any]] = {
    "signal": _signal,
    "sleep": _sleep,
    "raise": _raise,
    "loss times": _not_a_number,
    "infinite gradient": _infinite_gradient,
    "little memory": _little_memory,
    "half written": _half_written,
    "half copied": _half_copied,
    "cut file": _cut_file,
    "fill disk": _fill_disk,
    "meet": _meet,
    "answer": _answer,
    "write in place": _write_in_place,
}
