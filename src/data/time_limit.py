"""A time limit for what a disk or a mount may never answer, by leaving the thread behind that waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from src.errors import ExitCode, LoaderFault
from src.text import printable, shell_word
from src.user_command import corrected, of_data, shell_command

SECONDS = 300.0  # for folders, and where data.timeout_seconds says nothing else
GRACE_SECONDS = 1.0  # a process that was stopped for longer than the limit (Ctrl-Z) is at work again within it

Item = TypeVar("Item")
Result = TypeVar("Result")


class NoAnswer(Exception):
    """Something was not read in time; the one argument names it. One line, since a loader process hands on the text."""


class _Reader:
    """A thread that works for another as long as that one lives. A new thread for every batch would be given cores and
    memory of its own each time, and what is alive could not be told from what is left over."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = threading.Thread(
            target=_work_off, args=[self.tasks], daemon=True
        )  # does not keep a process alive
        self.thread.start()

    def __del__(self) -> None:
        self.tasks.put(None)


def _work_off(tasks: SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # it holds the results


_own = threading.local()


def one_by_one(
    work: Callable[[Item], Result], items: Sequence[Item], seconds: float, name: Callable[[Item], str] = str
) -> list[Result]:
    """[work(item) for item in items], of which none may take longer than `seconds` (0: no limit). Raises NoAnswer.

    The work is done in another thread, since nothing interrupts a read from a dead network disk; signals still arrive.
    """
    if not seconds:
        return [work(item) for item in items]
    done: list[Result] = []
    failed: list[BaseException] = []
    now: list[tuple[Any, float]] = [(None, time.monotonic())]  # the item at hand, and since when
    over = threading.Event()

    def run() -> None:
        try:
            for item in items:
                now[0] = item, time.monotonic()
                done.append(work(item))
        except BaseException as error:
            failed.append(error)
        over.set()

    reader = getattr(_own, "reader", None)
    if reader is None or not reader.thread.is_alive():  # not alive: this process is a fork
        reader = _Reader()
    _own.reader = None  # until it is free again: it may hang, and Ctrl-C may end the wait
    reader.tasks.put(run)
    while not over.is_set():
        before = now[0]
        over.wait(max(0.0, before[1] + seconds - time.monotonic()))
        if now[0] is before and time.monotonic() >= before[1] + seconds:
            if over.wait(GRACE_SECONDS) or now[0] is not before:
                continue
            raise NoAnswer(f"{name(before[0])}: no answer within {seconds:g} s")
    _own.reader = reader
    if failed:
        raise failed[0]
    return done


def in_time(work: Callable[[Item], Result], items: Sequence[Item], seconds: float | None = None) -> list[Result]:
    """As one_by_one; where there is no answer it raises what the user is to read. None: SECONDS, which nobody can set."""
    try:
        limit = SECONDS if seconds is None else seconds
        return one_by_one(work, items, limit, name=lambda item: printable(str(item)))
    except NoAnswer as error:
        raise hang_error(str(error), may_set=seconds is not None) from error


def hang_error(cause: str, may_set: bool = True) -> LoaderFault:
    """What the user reads. cause: the text of a NoAnswer. may_set: whether the limit is data.timeout_seconds."""
    path, _, limit = cause.rpartition(": no answer within ")
    fix = [f"ls -l {shell_word(path)}", f"{shell_command()}   # once it can be read"]
    if may_set:
        fix.append(corrected(of_data(f"timeout_seconds={4 * float(limit.split()[0]):g}")))
    return LoaderFault(
        f"an image or folder hangs: {cause}",
        where=path,
        why="a network disk that went away answers no read; or the image takes longer to load than the time limit",
        fix=fix,
        code=ExitCode.DATA,
    )
