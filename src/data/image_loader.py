"""Loads the images of a dataset in batches, and says what happened where one hangs, breaks, or ends its loader process.

Training, evaluate and predict load through it. Every fault leaves `next(batches)` as a UserError that names the file, never
the middle of a step: what was trained until then can be saved.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from src.data.reading import ImageError
from src.data.time_limit import NoAnswer, hangs, one_by_one
from src.errors import ExitCode, LoaderFault, Terminated, shared_memory_ran_out
from src.text import printable
from src.user_command import corrected, of_data, shell_command

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # where loader processes hand over their batches (Linux)
MOST_PROCESSES = 257  # 256, and the one that loads without them
Instead = Callable[[Any], Iterator[Any]]


class Watched(Dataset):
    """The images of a dataset, each read within timeout_seconds (0: no limit). A key is a number, or ends with one;
    images.name(number) says where the file is.

    skip: an image that broke since it was checked is left out, or replaced by the first that can be read of the keys that
    `instead` gives for its key; else it is an error.
    """

    def __init__(self, images: Dataset, timeout_seconds: float, skip: bool, instead: Instead | None) -> None:
        self.images, self.timeout_seconds, self.skip, self.instead = images, timeout_seconds, skip, instead
        self.said: set[str] = set()  # images that broke, over all epochs; in the process that trains
        # (pid, number of the image at hand) of each loader process: what is left of one that was killed.
        self.at_hand = multiprocessing.RawArray("q", 2 * MOST_PROCESSES)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Any]) -> tuple[list[Any], dict[str, str]]:
        """The items of a batch, and the images that broke: name -> 'path: cause'. Called by torch's loaders."""
        broken: dict[str, str] = {}
        items = one_by_one(partial(self._read, broken), keys, self.timeout_seconds, self._name)
        return [item for item in items if item is not None], broken

    def _read(self, broken: dict[str, str], key: Any) -> Any:
        try:
            return self._item(key)
        except ImageError as error:
            if not self.skip:
                raise
            broken[self._name(key)] = str(error)
        if self.instead is None:
            return None
        for other in self.instead(key):
            with suppress(ImageError):
                return self._item(other)
        raise ImageError(f"{broken[self._name(key)]}; nor can any other image of its class be read")

    def _item(self, key: Any) -> Any:
        worker = get_worker_info()
        place = 2 * (worker.id + 1 if worker else 0)
        self.at_hand[place : place + 2] = [os.getpid(), _number(key)]
        return self.images[key]

    def _name(self, key: Any) -> str:
        return printable(self.images.name(_number(key)))

    def names_at_hand(self, pids: set[int]) -> list[str]:
        """The images that processes were reading."""
        pairs = zip(self.at_hand[::2], self.at_hand[1::2], strict=True)
        return [printable(self.images.name(number)) for pid, number in pairs if pid in pids]


class ImageLoader(DataLoader):
    """A DataLoader of a Watched dataset, whose iterator raises LoaderFault, and Terminated where SIGTERM ended a process."""

    dataset: Watched

    def __iter__(self) -> Iterator[Any]:
        # Not where there is a GPU that the command leaves alone (trainer.accelerator=cpu): each process would set it up.
        self.pin_memory = torch.cuda.is_initialized()
        before = set(multiprocessing.active_children())
        processes: set[BaseProcess] = set()
        try:
            batches = super().__iter__()
        except RuntimeError as error:  # a process ended before the handler below was taken off
            raise _explained(error, self.dataset, set()) from error
        if self.num_workers:
            processes = set(multiprocessing.active_children()) - before
            if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
                # torch's handler raises wherever the program is when a loader process dies, in the middle of a step or
                # of a save, too. Without it the process is missed when its next batch is waited for.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iter(partial(self._next, batches, processes), None)

    def _next(self, batches: Iterator[Any], processes: set[BaseProcess]) -> Any:
        """The next batch that has an image; None: there is none left."""
        while True:
            try:
                batch, broken = next(batches)
            except StopIteration:
                return None
            except Exception as error:
                raise _explained(error, self.dataset, processes) from error
            said = self.dataset.said
            for name in broken.keys() - said:
                said.add(name)
                how = "replaced by another of its class" if self.dataset.instead else "left out"
                log.warning(f"{broken[name]}: it broke since it was checked and is {how} ({len(said)} by now)")
            if batch is not None:
                return batch


def image_loader(
    images: Dataset,
    sampler: Any,
    workers: int,
    *,
    timeout_seconds: float,
    skip: bool = False,
    instead: Instead | None = None,
    batch_bytes: int = 0,
    collate: Callable[[list[Any]], Any] = default_collate,
) -> ImageLoader:
    """sampler: of batches of keys. batch_bytes: of a batch, to see whether the shared memory has room for the workers'."""
    return ImageLoader(
        Watched(images, timeout_seconds, skip, instead),
        batch_sampler=sampler,
        num_workers=_with_room(workers, batch_bytes),
        collate_fn=partial(_collate, collate),
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),  # starting an iterator draws a number: not from the global generator
    )


def leave_signals_to_the_trainer(worker: int) -> None:
    """In a loader process: a group of its own, so that Ctrl-C in a terminal, or a kill of the trainer's group, does not
    reach it. The trainer answers those: it finishes its step, for which it may need the next batch, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # which SLURM sends to every process
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)


def _collate(collate: Callable[[list[Any]], Any], read: tuple[list[Any], dict[str, str]]) -> tuple[Any, dict[str, str]]:
    items, broken = read
    batch = collate(items) if items else None
    for part in batch if batch and get_worker_info() else ():
        if isinstance(part, torch.Tensor):
            part.share_memory_()  # without room it fails here; later a thread would swallow the error, and the batch with it
    return batch, broken


def _number(key: Any) -> int:
    return key[-1] if isinstance(key, tuple) else key


def _with_room(workers: int, batch_bytes: int) -> int:
    """As many of the loader processes as the shared memory has room for: each holds two batches, the trainer two more."""
    if not workers or not batch_bytes or not SHARED_MEMORY.is_dir():
        return workers
    room = os.statvfs(SHARED_MEMORY)
    free = room.f_bavail * room.f_frsize
    fitting = max(0, min(workers, (free // batch_bytes - 2) // 2))
    if fitting < workers:
        _say_once(
            f"{SHARED_MEMORY} has too little room for the batches of {workers} loader processes "
            f"({batch_bytes / 2**20:.1f} MiB each): {fitting or 'none'} of them are used. In Docker: --shm-size=8g"
        )
    return fitting


@cache
def _say_once(warning: str) -> None:
    log.warning(warning)


def _explained(error: Exception, dataset: Watched, processes: set[BaseProcess]) -> BaseException:
    """What a loader's error means. One from a loader process begins with its traceback: its last line is the cause."""
    last = (str(error).strip().splitlines() or [""])[-1]
    if isinstance(error, ImageError):
        return _broken(last.rpartition("ImageError: ")[2])
    if isinstance(error, NoAnswer):
        return hangs(last.rpartition("NoAnswer: ")[2])
    if str(error).startswith("Caught "):
        return error
    if isinstance(error, EOFError | OSError):  # a pipe to a process that is about to be gone, perhaps with a core dump
        gone = connection.wait([process.sentinel for process in processes], timeout=10)
        for process in processes:
            if process.sentinel in gone:
                process.join()  # a process closes its pipes before it has an exit code
    ended = {process.pid: process.exitcode for process in processes if process.exitcode}
    if not ended and "DataLoader worker" not in str(error):
        return error
    return _lost(ended, dataset.names_at_hand(set(ended)))


def _broken(cause: str) -> LoaderFault:
    return LoaderFault(
        f"an image broke while the run was under way: {cause}",
        why="all images could be read before the first step; the file was changed since, or the disk fails",
        fix=["mend or delete the file, then repeat the command:", shell_command()],
        code=ExitCode.DATA,
    )


def _lost(ended: dict[int | None, int], names: list[str]) -> BaseException:
    pid, code = next(iter(ended.items()), ("unknown", 0))
    if code == -signal.SIGTERM:
        return Terminated()  # a scheduler such as SLURM signals every process, and a loader ended first
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}" if code else "ended"
    if code == -getattr(signal, "SIGBUS", 7):
        return shared_memory_ran_out(f"a loader process {how}")
    why = "a library crashed, most likely over an image: without loader processes (num_workers=0) it shows where"
    if code == -getattr(signal, "SIGKILL", 9):
        why = "most likely the memory was full: then the kernel ends a process (`dmesg` says so); kill -9 does the same"
    return LoaderFault(
        f"a loader process (pid {pid}) {how}",
        where=f"it was reading {names[0]}" if names else "",
        why=why,
        fix=[f"{corrected(of_data('num_workers=1'))}   # fewer loader processes", shell_command()],
        code=ExitCode.PROCESS_LOST,
    )
