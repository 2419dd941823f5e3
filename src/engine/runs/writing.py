"""Writing Lightning's checkpoints: whole or not at all, and while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from src.engine.runs.checksum import save_with_checksum
from src.engine.runs.files import write_atomically
from src.engine.runs.text import shell_word

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"  # the newest position, and the one before it


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames; keeps the old last.ckpt as previous.ckpt. (Lightning writes through the temp
    folder: if that is another file system, a kill destroys the old file.)

    background: save_checkpoint only copies the tensors to the CPU, and one thread writes them.

    A position (last.ckpt) refers to other files, the weights of the best epochs. It reaches the disk after all files that
    were saved before it; a file is removed when neither last.ckpt nor previous.ckpt refers to it. The thread writes all
    waiting files in one round, the position last. Files saved meanwhile wait for the next round, where a newer copy
    replaces an older one: a slow disk keeps at most two copies of a file in memory, and a position waits for at most two
    rounds.

    A file that cannot be written (a full disk, a quota) stays as it was. Training goes on with a warning, and the file is
    tried again with the next position, which is not written without it.
    """

    def __init__(self, background: bool = True) -> None:
        self.background = background
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._waiting: dict[Path, dict[str, Any]] = {}  # files to be written
        self._removed: set[Path] = set()  # files to be removed since the last position
        self._unneeded: set[Path] = set()  # files to which the waiting position no longer refers
        self._needed_by_previous: set[Path] = set()
        self._has_new = False  # whether files were saved for which no round has been started
        self._jobs: list[Future[None]] = []

    @property
    def unwritten(self) -> set[Path]:
        """The files whose newest copy could not be written. Valid after wait()."""
        return set(self._waiting)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        if self.background:
            checkpoint = apply_to_collection(
                checkpoint, torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True)
            )
        is_position = path.name == LAST
        with self._lock:
            self._waiting[path] = checkpoint
            if is_position:
                self._unneeded |= self._removed
                self._removed = set()
        self._has_new = True
        if is_position or not self.background:
            self._submit()

    def remove_checkpoint(self, path: Any) -> None:
        """Also accepts a file that does not exist: an epoch that is trained again removes it again."""
        self._removed.add(Path(path))

    def wait(self) -> None:
        """Returns when every file has been written, or has failed."""
        if self._has_new:
            self._submit()
        for job in self._jobs:
            job.result()
        self._jobs = []

    def teardown(self) -> None:
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        if not self._waiting:
            _remove(self._needed_by_previous | self._removed)
            self._needed_by_previous, self._removed = set(), set()

    def _submit(self) -> None:
        self._has_new = False
        if not self.background:
            self._write_waiting()
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        for job in self._jobs:
            if job.done():
                job.result()  # raises the thread's error, unless the disk refused a file
        self._jobs = [*(job for job in self._jobs if not job.done()), self._thread.submit(self._write_waiting)]

    def _write_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            unneeded, self._unneeded = self._unneeded, set()
        failed: dict[Path, dict[str, Any]] = {}
        for path in sorted(waiting.keys() - unneeded, key=lambda path: path.name == LAST):
            checkpoint = waiting.pop(path)
            if (failed and path.name == LAST) or not _write(path, checkpoint):
                failed[path] = checkpoint
            elif path.name == LAST:
                _remove(self._needed_by_previous)
                self._needed_by_previous, unneeded = unneeded, set()
        with self._lock:
            self._waiting = failed | self._waiting
            self._unneeded |= unneeded


def _write(path: Path, checkpoint: dict[str, Any]) -> bool:
    """Whether the file could be written."""
    previous = path.with_name(PREVIOUS) if path.name == LAST else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: save_with_checksum(checkpoint, file), keep_old_as=previous)
        return True
    except (OSError, RuntimeError) as error:
        # torch raises an error of its own in place of the system's.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        log.warning(
            f"{path} could not be written: {reason.strerror}. The old file is kept, training goes on, and the new one "
            f"is tried again with the next position; make room on the disk: df -h {shell_word(path.parent)}"
        )
        return False


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):  # the disk may have become read-only
            path.unlink()
