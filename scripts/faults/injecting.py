"""Injects faults into a process: a signal, an exception or damage at the n-th call of a named function.

The programs have no hooks for tests. `python -m scripts.faults.victim MODULE words...` reads the faults from an environment
variable, wraps the functions they name as soon as the program imports them, and runs MODULE. Child processes (ranks of ddp,
Ray's workers) get the same faults through children/sitecustomize.py. This module imports no library before the program does.
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

# Functions that this project and a plain Lightning script both call.
STEP = "lightning.pytorch.strategies.strategy:Strategy.training_step"
LOSS = "torch.nn.functional:cross_entropy"
CONVOLUTION = "torch.nn.modules.conv:Conv2d.forward"
VALIDATION_STEP = "lightning.pytorch.strategies.strategy:Strategy.validation_step"
SAVE = "lightning.pytorch.trainer.trainer:Trainer.save_checkpoint"  # the request; the writing may come later
WRITE = "torch:save"
COPY = "shutil:copyfile"  # moves Lightning's checkpoint from a temporary folder on another file system
FETCH = "torch.utils.data._utils.fetch:_MapDatasetFetcher.fetch"  # the images of a batch
OPEN_IMAGE = "PIL.Image:open"


@dataclass(frozen=True)
class Fault:
    """An action at the n-th call of a function, in every process or in one.

    at: "package.module:Class.function". do, value: an entry of ACTIONS and its argument. nth: first call that is hit, from 1
    in each process; to: the last one; None: only nth; 0: all after nth. after: act after the call. Calls count only
    in this rank, in loader processes, inside a function of this name, since this file exists, in training (while gradients
    are recorded). once: marker file; while it exists, the fault does not happen again in a restarted process.
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
    training: bool = False


def kill(at: str, nth: int = 1, **options: Any) -> Fault:
    return Fault(at, "signal", int(signal.SIGKILL), nth, **options)


def send(number: int, at: str, nth: int = 1, **options: Any) -> Fault:
    """The process sends itself the signal, so that it arrives exactly at this call."""
    return Fault(at, "signal", int(number), nth, **options)


def little_memory(fits: int, **options: Any) -> Fault:
    """Training has memory for so many images at once."""
    return Fault(CONVOLUTION, "little memory", fits, to=0, training=True, **options)


def slow(at: str, seconds: float, nth: int = 1, to: int | None = 0, **options: Any) -> Fault:
    return Fault(at, "sleep", seconds, nth, to, **options)


def armed(
    faults: Sequence[Fault],
    environ: dict[str, str] | None = None,
    file_limit: int | None = None,
    peak: str | None = None,
) -> dict[str, str]:
    """Environment variables for a victim. environ: further variables for the program. file_limit: RLIMIT_FSIZE in bytes. peak:
    file that receives the peak memory in KiB."""
    if not (faults or environ or file_limit or peak):
        return {}
    state = {"faults": [asdict(fault) for fault in faults], "environ": environ or {}, "limit": file_limit, "peak": peak}
    return {VARIABLE: json.dumps(state)}


def arm() -> None:
    """Injects the faults named in the environment into this process and its children."""
    state = json.loads(os.environ.get(VARIABLE, "{}"))
    if not state:
        return
    os.environ.update(state["environ"])
    tempfile.tempdir = None  # cached, and TMPDIR may have changed
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
    if fault.training and not sys.modules["torch"].is_grad_enabled():
        return False
    if fault.since is not None and not Path(fault.since).exists():
        return False
    if fault.inside is not None and fault.inside not in _callers():
        return False
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))  # Lightning's own launcher sets the second only
    return fault.rank is None or fault.rank == rank


def _callers() -> Iterator[str]:
    """Names of the functions on the call stack."""
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


def _multiply(call: Call, factor: float, arguments: Sequence[Any]) -> Any:
    """The loss times the factor: nan, or inf."""
    return call() * factor


def _infinite_gradient(call: Call, _: None, arguments: Sequence[Any]) -> Any:
    """The loss is right, and every gradient infinite."""
    loss = call()
    loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


def _little_memory(call: Call, fits: int, arguments: Sequence[Any]) -> Any:
    """A layer that gets more images than fit runs out of memory."""
    if len(arguments[1]) > fits:
        raise sys.modules["torch"].OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return call()


def _half_written(call: Call, _: None, arguments: Sequence[Any]) -> Any:
    """Killed when torch.save has written half of the file. Saves into memory are left alone."""
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
    """Killed when shutil.copyfile has copied half of the checkpoint."""
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
    """Creates a file and waits until the test has removed it: in between the test acts on the process."""
    Path(path).touch()
    while Path(path).exists():
        time.sleep(0.02)
    return call()


def _answer(call: Call, value: Any, arguments: Sequence[Any]) -> Any:
    """Replaces the function by a constant, which switches a guard off."""
    return value


def _write_in_place(call: Call, _: None, arguments: Sequence[Any]) -> None:
    """Replaces src.engine.runs.files.write_atomically(path, write) by a plain write."""
    path, write = arguments[:2]
    with path.open("wb") as file:
        write(file)


ACTIONS: dict[str, Callable[[Call, Any, Sequence[Any]], Any]] = {
    "signal": _signal,
    "sleep": _sleep,
    "raise": _raise,
    "multiply": _multiply,
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
