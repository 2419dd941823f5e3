"""Loader processes that fail: what the error of one means for the user, and the end of those that are blocked, by SIGKILL, so
that the trainer that waits for them hears of it.

CPython 3.11 can block in fork() for ever: the child waits for a lock that another thread held when it was forked. Such a
process never says that it has started, or reads no image after it did, and answers no SIGTERM. A process that was stopped
(kill -STOP) hands over no batch.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
import time
import weakref
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from src.engine.commands.user_command import corrected, of_data, shell_command
from src.engine.images.reading import ImageError
from src.engine.images.time_limit import NoAnswer, hang_error
from src.engine.runs.errors import ExitCode, LoaderFault, Terminated, shared_memory_ran_out

if TYPE_CHECKING:
    from src.engine.images.image_loader import GuardedDataset

WAIT_SECONDS = 1.0  # between two looks: of the time in which the whole job is stopped (Ctrl-Z) no more than this counts
GRACE_SECONDS = 30.0  # beyond the time limit of an image: to collate a batch on a busy machine
NO_IMAGE = -2  # -1 is a place in a split
HANGS = (
    "it hangs since it was forked, most likely for a lock that another thread of the program held at that moment; "
    "a first attempt failed alike"
)

_loader_processes: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


class Watch:
    """Watches over the loader processes of one pass while the trainer waits for a batch, which is inside of `with watch`.

    By a thread, since the trainer may wait in a system call: it fetches a batch from the process that made it. `fault` says
    why the processes were killed: one did not start within start_seconds, or none began an image for its time limit. Another
    start may help where it names no image (`where`).
    """

    def __init__(self, processes: set[BaseProcess], dataset: GuardedDataset, start_seconds: float) -> None:
        self.processes, self.dataset, self.start_seconds = processes, dataset, start_seconds
        self.pids = {process.pid for process in processes if process.pid}
        self.fault: LoaderFault | None = None
        self.waits = 0  # odd while the trainer waits
        self.ended = threading.Event()
        _loader_processes.update(processes)
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self) -> None:
        self.waits += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.waits += 1

    def end(self) -> None:
        """Ends the thread, and the processes by SIGKILL: one that is blocked answers no other signal."""
        self.ended.set()
        for process in _kill(self.processes):
            process.join(timeout=5)

    def _run(self) -> None:
        pids = self.pids
        last, waited, silent = (0, {}), 0.0, 0.0
        limit = self.dataset.timeout_seconds
        while not self.ended.wait(WAIT_SECONDS):
            waits, records = self.waits, self.dataset.records(pids)
            waited = waited + WAIT_SECONDS if waits == last[0] else 0.0
            silent = silent + WAIT_SECONDS if (waits, records) == last else 0.0
            last = waits, records
            if waits % 2 == 0:
                continue
            not_started = pids - records.keys()
            if not_started and waited >= self.start_seconds:
                found = f"a loader process (pid {_joined(not_started)}) did not start within {waited:g} s"
                self.fault = _fault(found, HANGS, [])
            elif not not_started and limit and silent >= limit + GRACE_SECONDS:
                self.fault = _silent_fault(pids, self.dataset.names_at_hand(pids), silent)
            if self.fault:
                _kill(self.processes)
                return


@atexit.register
def _kill_all() -> None:
    """At the end of the program, where multiprocessing would wait for them."""
    _kill(set(_loader_processes))


def _kill(processes: set[BaseProcess]) -> set[BaseProcess]:
    """Returns those that lived."""
    living = processes.intersection(multiprocessing.active_children())  # of this process: a fork has none
    for process in living:
        process.kill()
    return living


def _silent_fault(pids: set[int], names: list[str], seconds: float) -> LoaderFault:
    stopped = {pid for pid in pids if _state(pid) in ("T", "t")}
    found = f"no answer from a loader process (pid {_joined(stopped or pids)}) for {seconds:g} s"
    why = "a library or a disk hangs in it" if names else HANGS
    if stopped:
        why = "it was stopped by a signal (kill -STOP)"
    return _fault(found, why, names)


def _fault(found: str, why: str, names: list[str], fix: list[str] | None = None) -> LoaderFault:
    """names: of the images that the processes were reading."""
    where = f"it was reading {names[0]}" if names else ""
    without = [shell_command(), f"{corrected(of_data('num_workers=0'))}   # without loader processes"]
    return LoaderFault(found, where=where, why=why, fix=fix or without, code=ExitCode.PROCESS_LOST)


def _joined(pids: set[int]) -> str:
    return ", ".join(map(str, sorted(pids)))


def _state(pid: int) -> str:
    """The kernel's letter for what a process does: T where it is stopped; empty where there is no /proc."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def explained(error: Exception, dataset: GuardedDataset, processes: set[BaseProcess]) -> BaseException:
    """What a loader's error means. One from a loader process begins with its traceback: its last line is the cause."""
    last = (str(error).strip().splitlines() or [""])[-1]
    if isinstance(error, ImageError):
        found = f"an image broke while the run was under way: {last.rpartition('ImageError: ')[2]}"
        why = "all images could be read before the first step; the file was changed since, or the disk fails"
        fix = ["mend or delete the file, then repeat the command:", shell_command()]
        return LoaderFault(found, why=why, fix=fix, code=ExitCode.DATA)
    if isinstance(error, NoAnswer):
        return hang_error(last.rpartition("NoAnswer: ")[2])
    if str(error).startswith("Caught "):
        return error
    if isinstance(error, EOFError | OSError):  # a pipe to a process that is about to be gone, perhaps with a core dump
        gone = connection.wait([process.sentinel for process in processes], timeout=10)
        for process in processes:
            if process.sentinel in gone:
                process.join()  # a process closes its pipes before it has an exit code
                if process.exitcode is None:
                    time.sleep(0.1)  # another thread that waited for it notes the code a moment later
    ended = {process.pid: process.exitcode for process in processes if process.exitcode and process.pid}
    if not ended and "DataLoader worker" not in str(error):
        return error
    return _lost(ended, dataset.names_at_hand(set(ended)))


def _lost(ended: dict[int, int], names: list[str]) -> BaseException:
    pid, code = next(iter(ended.items()), ("unknown", 0))
    if code == -signal.SIGTERM:
        return Terminated()  # a scheduler such as SLURM signals every process, and a loader ended first
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}" if code else "ended"
    if code == -getattr(signal, "SIGBUS", 7):
        return shared_memory_ran_out(f"a loader process {how}")
    why = "a library crashed, most likely over an image: without loader processes (num_workers=0) it shows where"
    if code == -getattr(signal, "SIGKILL", 9):
        why = "most likely the memory was full: then the kernel ends a process (`dmesg` says so); kill -9 does the same"
    fix = [f"{corrected(of_data('num_workers=1'))}   # fewer loader processes", shell_command()]
    return _fault(f"a loader process (pid {pid}) {how}", why, names, fix)
