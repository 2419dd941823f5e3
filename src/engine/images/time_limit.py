"""A time limit for what a disk or a mount may never answer, by leaving the thread behind that waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from src.engine.commands.user_command import corrected, of_data, shell_command
from src.engine.runs.errors import ExitCode, LoaderFault
from src.engine.runs.text import printable, shell_word

SECONDS = 300.0  # for folders, and where data.timeout_seconds says nothing else
GRACE_SECONDS = 1.0  # a process that was stopped for longer than the limit (Ctrl-Z) is at work again within it

Item = TypeVar("Item")
Result = TypeVar("Result")


class NoAnswer(Exception):
    """Something was not read in time; the one argument names it. One line, since a loader process hands on the text."""


class _Reader:
    """A thread that does the work of the thread that owns it, as long as that lives. A new thread for every batch would
    have a malloc arena of its own, and a thread that hangs could not be told from one that is still needed."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = threading.Thread(
            target=_run_tasks, args=[self.tasks], daemon=True
        )  # does not keep a process alive
        self.thread.start()

    def __del__(self) -> None:
        self.tasks.put(None)


def _run_tasks(tasks: SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # it holds the results


_of_this_thread = threading.local()


def one_by_one(
    work: Callable[[Item], Result], items: Sequence[Item], seconds: float, name: Callable[[Item], str] = str
) -> list[Result]:
    """[work(item) for item in items], of which none may take longer than `seconds` (0: no limit). Raises NoAnswer.

    The work is done in another thread, since nothing interrupts a read from a dead network disk; signals still arrive.
    """
    if not seconds:
        return [work(item) for item in items]
    results: list[Result] = []
    errors: list[BaseException] = []
    current: list[tuple[Any, float]] = [(None, time.monotonic())]  # the item at hand, and since when
    finished = threading.Event()

    def run() -> None:
        try:
            for item in items:
                current[0] = item, time.monotonic()
                results.append(work(item))
        except BaseException as error:
            errors.append(error)
        finished.set()

    reader = getattr(_of_this_thread, "reader", None)
    if reader is None or not reader.thread.is_alive():  # not alive: this process is a fork
        reader = _Reader()
    _of_this_thread.reader = None  # until it is free again: it may hang, and Ctrl-C may end the wait
    reader.tasks.put(run)
    while not finished.is_set():
        before = current[0]
        finished.wait(max(0.0, before[1] + seconds - time.monotonic()))
        if current[0] is before and time.monotonic() >= before[1] + seconds:
            if finished.wait(GRACE_SECONDS) or current[0] is not before:
                continue
            raise NoAnswer(f"{name(before[0])}: no answer within {seconds:g} s")
    _of_this_thread.reader = reader
    if errors:
        raise errors[0]
    return results


def in_time(work: Callable[[Item], Result], items: Sequence[Item], seconds: float | None = None) -> list[Result]:
    """As one_by_one, but raises the error that a user reads. seconds None: SECONDS, which is no setting."""
    try:
        limit = SECONDS if seconds is None else seconds
        return one_by_one(work, items, limit, name=lambda item: printable(str(item)))
    except NoAnswer as error:
        raise hang_error(str(error), may_set=seconds is not None) from error


def hang_error(cause: str, may_set: bool = True) -> LoaderFault:
    """cause: the text of a NoAnswer. may_set: whether the limit is data.timeout_seconds."""
    path, _, limit = cause.rpartition(": no answer within ")
    fix = [f"ls -l {shell_word(path)}", f"{shell_command()}   # once it can be read"]
    if may_set:
        fix.append(corrected(of_data(f"timeout_seconds={4 * float(limit.split()[0]):g}")))
    found = f"an image or folder hangs: {cause}"
    why = "a network disk that went away answers no read; or the image takes longer to load than the time limit"
    return LoaderFault(found, where=path, why=why, fix=fix, code=ExitCode.DATA)
