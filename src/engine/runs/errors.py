"""What a user reads when something is wrong: UserError, the exit codes, and the one place that prints them.

Every front door runs its work through `run_and_report`. A mistake that a user can mend is a `UserError`: it fills at most
15 lines (what was found, where, why, a command to paste), and its traceback goes to a file. Any other exception is a defect;
its last frames are shown, and it has its own exit code.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import shlex
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

from src.engine.commands.user_command import corrected, named, of_data, shell_command, typed_words
from src.engine.project import PROJECT
from src.engine.runs import logs, signals
from src.engine.runs.signals import Terminated
from src.engine.runs.text import printable, printable_lines, shell_word

MAX_LINES = 15
# In torch's messages about loader processes that have no shared memory left.
SHARED_MEMORY = re.compile("Bus error|unable to write to file </torch_|(unable to allocate|out of) shared memory")
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # a full disk, a quota; Windows has no quota error
NO_ROOM = (*FULL, errno.EFBIG, errno.EROFS)  # a limit on the size of files, a disk that has become read-only


class ExitCode(IntEnum):
    """The exit codes of every command; docs/errors.md explains them. Numbers follow sysexits.h where one fits."""

    OK = 0
    TRIALS_FAILED = 1  # of a sweep with hydra/launcher=ray_tune or hydra/sweeper=ray_tune
    USAGE = 2  # an option that does not exist, such as --hlp
    CONFIG = 64  # the command line or a YAML file asks for something that does not exist or contradicts itself
    DATA = 65  # the images or labels are not what the command needs
    NO_INPUT = 66  # a file or folder that was named does not exist or cannot be read
    UNAVAILABLE = 69  # this machine lacks it: a GPU, a package, the network
    BUG = 70  # not the user's mistake: an unexpected exception
    OUT_OF_MEMORY = 71  # not even one image at a time fits
    GPU_FAULT = 72  # the GPU stopped in a way that cannot be repeated: a device-side assert, an illegal address
    CANNOT_WRITE = 73  # the run folder cannot be written
    DAMAGED = 74  # every checkpoint that could be read from is damaged
    BUSY = 75  # another process works in the same run folder
    PROCESS_LOST = signals.PARENT_LOST  # a process of the run died or no longer answers; repeat the command to continue
    DIVERGED = 77  # a loss, a gradient or a weight is nan or inf
    INTERRUPTED = signals.INTERRUPTED  # Ctrl-C; repeat the command to continue
    TERMINATED = signals.TERMINATED  # SIGTERM; repeat the command to continue


class UserError(Exception):
    """A mistake that the user can mend.

    found: what is wrong, in one line that names the culprit.
    where: the file, folder or setting it was found in.
    why: why that cannot work, or what usually causes it.
    fix: commands to paste or things to do, one each.
    """

    def __init__(
        self,
        found: str,
        *,
        where: str = "",
        why: str = "",
        fix: str | Sequence[str] = (),
        code: ExitCode = ExitCode.CONFIG,
    ) -> None:
        super().__init__(found)
        self.found, self.where, self.why, self.code = found, where, why, code
        self.fix = [fix] if isinstance(fix, str) else list(fix)

    def render(self, trace_file: Path | None = None) -> str:
        """The message as printed, at most MAX_LINES lines whatever was put into it."""
        rows = [("ERROR", f"{self.found}  (exit code {self.code.value})"), ("where", self.where), ("why", self.why)]
        rows += [("fix" if i == 0 else "or", fix) for i, fix in enumerate(self.fix)]
        tail = [_row("trace", str(trace_file))] if trace_file else []
        lines = [line for label, text in rows if text for line in _row(label, text).split("\n")]
        room = MAX_LINES - len(tail)
        if len(lines) > room:
            lines = [*lines[: room - 1], "        ..."]
        return "\n".join(map(printable_lines, lines + tail))


def data_error(found: str, *, where: object, why: str, fix: str | Sequence[str]) -> UserError:
    """The images, the labels or a file of theirs are not what the command needs. where: a Path is shown from the root."""
    shown = printable(where.absolute()) if isinstance(where, Path) else str(where)
    return UserError(found, where=shown, why=why, fix=fix, code=ExitCode.DATA)


class LoaderFault(UserError):
    """An image or a loader process failed, between two steps of a training."""


class ErrorOfProcess(UserError):
    """The message that another process of the same run printed before it ended, shown unchanged, with its exit code.

    process: which one, if the message does not say so. The code has a default because pickle passes none.
    """

    def __init__(self, text: str, code: ExitCode = ExitCode.BUG, process: str = "") -> None:
        super().__init__(text, where=process, code=code)

    def render(self, trace_file: Path | None = None) -> str:
        first, *rest = self.found.splitlines()[-MAX_LINES:]
        process = [_row("process", self.where)] if self.where else []
        return "\n".join(map(printable_lines, [first, *process, *rest][:MAX_LINES]))


def _row(label: str, text: str) -> str:
    """'label   text', wrapped under the text. Commands stay on one line, so that they can be pasted."""
    if label in ("fix", "or", "trace"):
        return f"{label:<7} {printable(text)}"
    wrapped = []
    for line in text.split("\n"):
        wrapped += textwrap.wrap(line, 110, break_long_words=False, break_on_hyphens=False) or [""]
    return f"{label:<7} " + "\n        ".join(wrapped)


def run_and_report(work: Callable[[], object], trace_dir: Callable[[], Path | None] = lambda: None) -> int:
    """Runs a front door's work and returns its exit code, after printing what went wrong.

    trace_dir: returns the folder that keeps a failure's traceback (the run folder, once it is open).
    """
    logs.to_screen()
    try:
        with signals.raised():
            code = _run(work, trace_dir)
    except KeyboardInterrupt:
        logs.say("\nInterrupted. Repeat the command with the same name= to continue.")
        code = ExitCode.INTERRUPTED
    except Terminated:
        logs.say("\nEnded by SIGTERM. Repeat the command with the same name= to continue.")
        code = ExitCode.TERMINATED
    error = logs.flush_screen()
    if signals.is_front_door():
        gc.freeze()  # as the process ends, Python would look for garbage among a million objects: 1.3 seconds
    return code if error is None or code != ExitCode.OK else _cannot_print(error)


def _cannot_print(error: OSError) -> int:
    logs.say(f"ERROR   what was printed cannot be written: {error.strerror}  (exit code {ExitCode.CANNOT_WRITE.value})")
    return ExitCode.CANNOT_WRITE


def _run(work: Callable[[], object], trace_dir: Callable[[], Path | None]) -> int:
    try:
        _check_clone()
        work()
        return ExitCode.OK
    except SystemExit as error:  # --help
        if not isinstance(error.code, int | None):
            raise
        return error.code or ExitCode.OK
    except Exception as error:
        explained = _explained(error, trace_dir())
        is_unclear = not isinstance(explained, UserError) or explained.code == ExitCode.PROCESS_LOST
        if is_unclear and (number := signals.received()):  # a C import or another process turned the signal into this
            raise signals.error_of(number) from error
        if isinstance(error, OSError) and error.filename is None and logs.is_screen_gone():
            # `| head` closed our output after reading enough. A loader process's pipe breaks too, but the screen is there.
            return ExitCode.OK if isinstance(error, BrokenPipeError) else _cannot_print(error)
        trace = None if isinstance(error, ErrorOfProcess) else _write_trace(trace_dir())
        if isinstance(explained, UserError):
            logs.say(explained.render(trace))
            return explained.code
        logs.say(_unexpected(error, trace))
        return ExitCode.BUG


def _check_clone() -> None:
    """Raises UserError where `python src/train.py` of one clone imports the src/ of another, which is installed (pip -e)."""
    started = Path(getattr(sys.modules["__main__"], "__file__", None) or PROJECT / "src" / "train.py").resolve()
    if started.parent.name == "src" and (started.parent / "engine").is_dir() and started.parent != PROJECT / "src":
        raise UserError(
            f"{started} would run the code of another clone, {PROJECT}",
            where=str(PROJECT / "src"),
            why="Python looks for src/ where it is installed, unless a command begins with python -m",
            fix=f"cd {shell_word(started.parent.parent)} && python -m src.{started.stem} {shlex.join(sys.argv[1:])}".strip(),
        )


def _explained(error: Exception, folder: Path | None) -> Exception:
    """A UserError for a library's error that means the machine lacks something; else the error itself."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return _disk_full(error, folder)
    if isinstance(error, PermissionError) and error.filename is not None:
        return _no_permission(os.fsdecode(error.filename))
    if isinstance(error, UserError) or not SHARED_MEMORY.search(str(error)):
        return error
    return shared_memory_ran_out(_cause(error))


def shared_memory_ran_out(cause: str) -> UserError:
    return UserError(
        "the loader processes ran out of shared memory",
        where=f"/dev/shm; the error was: {cause}",
        why="loader processes pass their batches through it, and a container has only 64 MB of it by default",
        fix=[corrected(of_data("num_workers=0")), "docker run --shm-size=8g, or a larger /dev/shm"],
        code=ExitCode.UNAVAILABLE,
    )


def _disk_full(error: OSError, folder: Path | None) -> UserError:
    path = Path(error.filename or folder or ".")  # a failed write does not name its file
    again = named(folder.name) if folder and "-m" not in typed_words() else shell_command()
    remedy = "once the disk may be written to again" if error.errno == errno.EROFS else "once there is room"
    return UserError(
        f"the disk {'is full' if error.errno in FULL else 'takes no more'}: {error.strerror}",
        where=str(path.absolute()).removesuffix(f".{os.getpid()}.tmp"),
        why="results, logs and checkpoints are written there; earlier files are whole",
        fix=[f"df -h {shell_word(path.parent)}", f"{again}   # {remedy}"],
        code=ExitCode.CANNOT_WRITE,
    )


def _no_permission(path: str) -> UserError:
    # os.path, because Path.exists raises for a folder that may not be looked into
    seen = next((parent for parent in Path(path).absolute().parents if os.path.exists(parent)), Path("/"))  # noqa: PTH110
    return UserError(
        f"{printable(path)} may not be read or written: permission denied",
        where=os.path.abspath(path),  # noqa: PTH100
        why="it belongs to another user, or one of the folders above it may not be looked into",
        fix=f"ls -ld {shell_word(seen)}",
        code=ExitCode.NO_INPUT,
    )


def _unexpected(error: Exception, trace_file: Path | None) -> str:
    """A defect on one screen: the error, its last frames, and the file with the rest."""
    if os.environ.get("FULL_TRACE") == "1":
        return traceback.format_exc()
    frames = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    lines = _row("ERROR", f"unexpected {type(error).__name__}: {_cause(error)}").split("\n")[:7]
    lines += [_row("at", frame) for frame in frames[-3:]]
    lines.append(_row("why", "this is a defect of the program or of a library, not a mistake of yours"))
    lines.append(_row("fix", "set FULL_TRACE=1 and repeat the command to see the whole traceback here"))
    if trace_file:
        lines.append(_row("trace", str(trace_file)))
    return "\n".join(map(printable_lines, lines))


def _cause(error: Exception) -> str:
    """The first lines of a message; of a loader process's exception, which begins with its traceback, the last one."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or ["(no message)"]
    if lines[0].startswith("Caught ") and " in DataLoader worker" in lines[0]:
        return f"{lines[-1].strip()}\n{lines[0]}"
    return "\n".join(lines[:4])


def _write_trace(folder: Path | None) -> Path | None:
    """Writes the traceback of the exception being handled. Failing to do so must not hide the error itself."""
    try:
        rank = os.environ.get("RANK", "0")
        if folder is not None and folder.is_dir():
            path = folder / ("error.log" if rank == "0" else f"rank{rank}.log")
        else:
            handle, name = tempfile.mkstemp(prefix="train-error-", suffix=".log")
            os.close(handle)
            path = Path(name)
        with path.open("w" if rank == "0" else "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(traceback.format_exc())
        return path
    except OSError:
        return None
