"""Loads the images of a dataset in batches, and says what happened where one hangs, breaks, or ends its loader process.

Training, evaluate and predict load through it. Every fault leaves `next(batches)` as a UserError that names the file, never
the middle of a step: what was trained until then can be saved.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from src.engine.images import time_limit
from src.engine.images.loader_watch import NO_IMAGE, Watch, explained
from src.engine.images.reading import ImageError
from src.engine.images.time_limit import one_by_one
from src.engine.memory.ram import give_back_freed_memory
from src.engine.runs import seeding, signals
from src.engine.runs.text import printable

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # where loader processes hand over their batches (Linux)
MOST_PROCESSES = 257  # 256 loader processes, and the trainer with num_workers=0
START_SECONDS = 60.0  # a loader process that has not started by then is blocked
# Of the second start: where processes are not forked, each of them imports torch, perhaps from a slow disk.
SECOND_START_SECONDS = 300.0
Replacements = Callable[[Any], Iterator[Any]]


class GuardedDataset(Dataset):
    """The images of a dataset, each read within timeout_seconds (0: no limit). A key is a number, or ends with one;
    images.name(number) says where the file is.

    skip: an image that broke since it was checked is left out, or replaced by the first that can be read of the keys that
    replacements(key) gives; else it is an error.
    """

    def __init__(self, images: Dataset, timeout_seconds: float, skip: bool, replacements: Replacements | None) -> None:
        self.images, self.timeout_seconds, self.skip, self.replacements = images, timeout_seconds, skip, replacements
        self.broken_names: set[str] = set()  # images that broke, over all epochs; in the process that trains
        # A slot of three numbers per loader process, which outlives a killed one: its pid since it has started, the number
        # of the image it reads (NO_IMAGE: none), and how many it has begun to read.
        self.slots = multiprocessing.RawArray("q", 3 * MOST_PROCESSES)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Any]) -> tuple[list[Any], dict[str, str]]:
        """The items of a batch, and the images that broke: name -> 'path: cause'. Called by torch's loaders."""
        broken: dict[str, str] = {}
        trainer, threads = threading.get_ident(), torch.get_num_threads()

        def read(key: Any) -> Any:
            # A thread that reads would start OpenMP threads of its own, which spin on the cores that the training computes on.
            if threading.get_ident() != trainer:
                torch.set_num_threads(1)
            return self._read(broken, key)

        try:
            with seeding.generators_kept():
                items = one_by_one(read, keys, self.timeout_seconds, self._name)
        finally:  # the number is also that of every thread which starts later
            torch.set_num_threads(threads)
        self.record(NO_IMAGE)
        return [item for item in items if item is not None], broken

    def _read(self, broken: dict[str, str], key: Any) -> Any:
        try:
            return self._item(key)
        except ImageError as error:
            if not self.skip:
                raise
            broken[self._name(key)] = str(error)
        if self.replacements is None:
            return None
        for other in self.replacements(key):
            with suppress(ImageError):
                return self._item(other)
        raise ImageError(f"{broken[self._name(key)]}; nor can any other image of its class be read")

    def _item(self, key: Any) -> Any:
        self.record(_index(key))
        return self.images[key]

    def _name(self, key: Any) -> str:
        return printable(self.images.name(_index(key)))

    def record(self, number: int) -> None:
        """Writes into the slot of this loader process that it reads this image now."""
        worker = get_worker_info()
        slot = 3 * (worker.id + 1 if worker else 0)
        self.slots[slot : slot + 3] = [os.getpid(), number, self.slots[slot + 2] + 1]

    def records(self, pids: set[int]) -> dict[int, tuple[int, int]]:
        """pid -> (number of the image it reads, reads begun), of the processes that have started."""
        rows = zip(self.slots[::3], self.slots[1::3], self.slots[2::3], strict=True)
        return {pid: (number, reads) for pid, number, reads in rows if pid in pids}

    def names_at_hand(self, pids: set[int]) -> list[str]:
        """The images that these processes were reading."""
        return [self._name(number) for number, _ in self.records(pids).values() if number != NO_IMAGE]


class ImageLoader:
    """Batches of a GuardedDataset, one pass at a time. The loader processes stay from pass to pass, until end(): a fork makes
    the trainer copy all memory that it writes to afterwards, and a process that is not forked imports torch first.

    A pass raises LoaderFault, and Terminated where SIGTERM ended a process. build: a DataLoader.
    """

    def __init__(self, dataset: GuardedDataset, build: Callable[[], DataLoader]) -> None:
        self.dataset, self.build = dataset, build
        self.loader = build()
        self.processes: set[BaseProcess] = set()
        self.watch: Watch | None = None
        self.batch_sampler, self.num_workers = self.loader.batch_sampler, self.loader.num_workers

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return _Batches(self)

    def begin(self, start_seconds: float) -> Iterator[Any]:
        """A pass, from processes that may fail. start_seconds: how long they may take to start."""
        # Not where there is a GPU that the command leaves alone (trainer.accelerator=cpu): each process would set it up.
        self.loader.pin_memory = torch.cuda.is_initialized()
        before, first = set(multiprocessing.active_children()), self.num_workers > 0 and self.watch is None
        if first:
            give_back_freed_memory()  # which a fork would hold on to as soon as the trainer writes to it again
        with self.watch or nullcontext():
            batches = iter(self.loader)
        if first:
            self.processes = set(multiprocessing.active_children()) - before
            self.watch = Watch(self.processes, self.dataset, start_seconds)
            # Called before any __del__, also by the collector of cycles: there torch would wait 5 s for each process.
            self.finalizer = weakref.finalize(self, self.watch.end)
            if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
                # torch's handler raises wherever the program is when a loader process dies, in the middle of a step or
                # of a save, too. Without it the process is missed when its next batch is waited for.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return batches

    def end(self) -> None:
        """Ends the processes; another pass starts others."""
        if self.watch:
            self.finalizer()
            self.loader, self.watch = self.build(), None


class _Batches(Iterator[Any]):
    """The batches of one pass, from loader processes that may die, be stopped, or hang: all are started again once."""

    def __init__(self, loader: ImageLoader) -> None:
        self.loader, self.dataset = loader, loader.dataset
        self.batches: Iterator[Any] | None = None  # begun with the first batch: Lightning begins a first epoch twice
        self.received = self.skipped = 0  # batches of this pass, and how many of them a second start has yet to skip
        self.started_again = False

    def __next__(self) -> Any:
        """The next batch that has an image."""
        while True:
            batch, broken = self._receive()
            if self.skipped:
                self.skipped -= 1
                continue
            self.received += 1
            reported = self.dataset.broken_names
            for name in broken.keys() - reported:
                reported.add(name)
                how = "replaced by another of its class" if self.dataset.replacements else "left out"
                log.warning(f"{broken[name]}: it broke since it was checked and is {how} ({len(reported)} by now)")
            if batch is not None:
                return batch

    def _receive(self) -> Any:
        try:
            if self.batches is None:
                self.batches = self.loader.begin(SECOND_START_SECONDS if self.started_again else START_SECONDS)
            with self.loader.watch or nullcontext():
                return next(self.batches)
        except StopIteration:
            raise
        except Exception as error:
            self._raise_unless_replaced(error)
        self.batches = None
        self.loader.end()
        self.started_again, self.skipped = True, self.received
        return self._receive()

    def _raise_unless_replaced(self, error: Exception) -> None:
        """Raises what the error means, unless new processes may do better: outside of the except block, in which the error's
        traceback holds on to the old ones."""
        watch = self.loader.watch
        if watch is None or watch.fault is None:
            raise explained(error, self.dataset, self.loader.processes) from error
        if watch.fault.where or self.started_again:
            raise watch.fault from error
        log.warning(f"{watch.fault}: all of them are started again")


@dataclass(frozen=True)
class LoaderSettings:
    batch_size: int
    workers: int = 0  # loader processes
    timeout_seconds: float = time_limit.SECONDS  # for an image; 0: no limit
    skip_bad: bool = False  # images that broke are left out


def image_loader(
    images: Dataset,
    sampler: Any,
    settings: LoaderSettings,
    image_size: int,
    *,
    replacements: Replacements | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
) -> ImageLoader:
    """sampler: of batches of keys. image_size: tells whether the shared memory has room for the workers' batches."""
    workers = _with_room(settings.workers, settings.batch_size * 3 * image_size**2)
    dataset = GuardedDataset(images, settings.timeout_seconds, settings.skip_bad, replacements)
    build = partial(
        DataLoader,
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=partial(_collate, collate),
        worker_init_fn=partial(_begin_worker, dataset, os.getpid()),
        # From Python 3.14 on Linux no longer forks by itself: each process would import torch anew.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # starting an iterator draws a number: not from the global generator
    )
    return ImageLoader(dataset, build)


def _begin_worker(dataset: GuardedDataset, trainer: int, worker: int) -> None:
    """In a loader process: a group of its own, so that Ctrl-C in a terminal, or a kill of the trainer's group, does not
    reach it. The trainer answers those: it finishes its step, for which it may need the next batch, and ends its workers."""
    dataset.record(NO_IMAGE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # which SLURM sends to every process
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)
    # torch's own check takes the parent at this moment for the trainer: of one that died before, a loader is left over.
    signals.end_with(trainer)


def _collate(collate: Callable[[list[Any]], Any], read: tuple[list[Any], dict[str, str]]) -> tuple[Any, dict[str, str]]:
    items, broken = read
    batch = collate(items) if items else None
    for part in batch if batch and get_worker_info() else ():
        if isinstance(part, torch.Tensor):
            part.share_memory_()  # without room it fails here; later a thread would swallow the error, and the batch with it
    return batch, broken


def _index(key: Any) -> int:
    return key[-1] if isinstance(key, tuple) else key


def _with_room(workers: int, batch_bytes: int) -> int:
    """As many of the loader processes as the shared memory has room for: each holds two batches, the trainer two more."""
    if not workers or not SHARED_MEMORY.is_dir():
        return workers
    room = os.statvfs(SHARED_MEMORY)
    free = room.f_bavail * room.f_frsize
    fitting = max(0, min(workers, (free // batch_bytes - 2) // 2))
    if fitting < workers:
        _warn_once(
            f"{SHARED_MEMORY} has too little room for the batches of {workers} loader processes "
            f"({batch_bytes / 2**20:.1f} MiB each): {fitting or 'none'} of them are used. In Docker: --shm-size=8g"
        )
    return fitting


@cache
def _warn_once(warning: str) -> None:
    log.warning(warning)
