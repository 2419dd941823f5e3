"""The effect of Ctrl-C and SIGTERM on a command, from its first line to its last.

Before there is anything to tidy up, and after the command has tidied up, they end the process at once. In between the
first signal is raised in the main thread, as KeyboardInterrupt or Terminated, and further ones are ignored while the
command tidies up; if that takes longer than END_SECONDS, the process is ended. While a run trains,
src/engine/runs/position.py handles signals instead, and in a command that starts other processes,
src/engine/processes/launching.py does. SIGUSR1 is taken as SIGTERM: SLURM often announces the end of a job with it
(sbatch --signal=USR1@120).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143  # exit codes, as in a shell: 128 + the signal's number
NUMBERS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
PARENT_LOST = 76  # the exit code PROCESS_LOST
END_SECONDS = 8.0

Handler = Callable[[int, FrameType | None], None]


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt not an Exception, so that only the front door handles it."""


class _State:
    is_front_door = False  # this process runs nothing but this command
    received = 0  # the signal that ends this command
    tidied_up = threading.Event()


def code_of(number: int) -> int:
    """The exit code of a command ended by the signal."""
    return INTERRUPTED if number == signal.SIGINT else TERMINATED


def error_of(number: int) -> BaseException:
    """The exception by which the signal ends a command."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def end_at_once() -> None:
    """From here on signals end this process without a traceback, because there is nothing to tidy up."""
    _State.is_front_door = True
    for number in NUMBERS:
        signal.signal(number, lambda number, _: os._exit(code_of(number)))


def is_front_door() -> bool:
    """Whether the process ends with this command."""
    return _State.is_front_door


def received() -> int:
    """The signal that ends this command, or 0."""
    return _State.received


def end_begins(number: int) -> None:
    """The command ends because of this signal: further ones are ignored, so that saving can finish."""
    _State.received = _State.received or number


def kill_loaders() -> None:
    """Ends the loader processes: torch would wait five seconds for each that hangs."""
    from multiprocessing import active_children  # front doors import this file first

    for child in active_children():
        child.kill()


def kill(code: int) -> None:
    """Ends this process and its loader processes now, whatever its main thread does."""
    kill_loaders()
    os._exit(code)


def end_with(parent: int) -> None:
    """Ends this process soon after its parent has ended in any way. Not on Windows, which keeps the number of a dead parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(PARENT_LOST)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True, name="end_with_parent").start()


@contextmanager
def raised() -> Iterator[None]:
    """Inside, the first signal is raised in the main thread."""
    _State.received = 0
    _State.tidied_up.clear()
    try:
        with handled_by(_raise):
            yield
    finally:
        _State.tidied_up.set()
        if _State.is_front_door and _State.received:  # the interpreter takes a while to end, with its own exit code
            for number in NUMBERS:
                signal.signal(number, signal.SIG_IGN)


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Inside, the handler gets the signals. Does nothing outside of the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def _raise(number: int, frame: FrameType | None) -> None:
    if _State.received:
        return
    _State.received = number
    # The exception may be swallowed by code that catches everything (a finalizer, an import in C): hence the thread.
    threading.Thread(target=_end_in_time, args=[code_of(number)], daemon=True).start()
    raise error_of(number)


def _end_in_time(code: int) -> None:
    if not _State.tidied_up.wait(END_SECONDS):
        kill(code)
