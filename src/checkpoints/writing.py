"""How Lightning's checkpoints reach the disk: whole or not at all, and while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from src.checkpoints.checksum import save_with_checksum
from src.run_dir import write_atomically

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"  # the newest position, and the one before it


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames; keeps the last.ckpt that stood there as previous.ckpt.

    Lightning's own writing goes through the temp folder, and a kill on another file system destroys the old file.

    background: save_checkpoint only copies the tensors to the CPU, and one thread writes them. Where saves come faster
    than the disk takes them, a copy that waits is replaced by a newer one of the same file. At most one copy a file
    waits while another is written.

    A file that cannot be written (a full disk, a quota) stays as it was: training goes on with a warning, and the file is
    in `failed` until it could be written.
    """

    def __init__(self, background: bool = True) -> None:
        self.background = background
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._waiting: dict[Path, dict[str, Any]] = {}
        self._jobs: list[Future[None]] = []
        self.failed: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.background:
            self._write(path, checkpoint)
            return
        copy = apply_to_collection(checkpoint, torch.Tensor, _copy_to_cpu)
        with self._lock:
            self._waiting[path] = copy
        self._submit(self._write_waiting, path)

    def remove_checkpoint(self, path: Any) -> None:
        """After the writes that were asked for before. A file that is not there is no error: a repeated epoch removes again."""
        if self.background:
            self._submit(Path(path).unlink, True)
        else:
            Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Waits until everything is written."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
            self._raise_errors()

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._raise_errors()
        self._jobs.append(self._thread.submit(work, *arguments))

    def _raise_errors(self) -> None:
        """What went wrong in the thread, apart from a disk that does not take the file, is raised here."""
        ended, self._jobs = [job for job in self._jobs if job.done()], [job for job in self._jobs if not job.done()]
        for job in ended:
            job.result()

    def _write_waiting(self, path: Path) -> None:
        with self._lock:
            checkpoint = self._waiting.pop(path, None)
        if checkpoint is not None:  # else a newer copy took its place and is written already
            self._write(path, checkpoint)

    def _write(self, path: Path, checkpoint: dict[str, Any]) -> None:
        previous = path.with_name(PREVIOUS) if path.name == LAST else None
        try:
            write_atomically(path, lambda file: save_with_checksum(checkpoint, file), keep_old_as=previous)
            self.failed.discard(path)
        except (OSError, RuntimeError) as error:
            # torch hides the system's error behind one of its own.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            self.failed.add(path)
            log.warning(
                f"{path} could not be written: {reason.strerror}. What stood there before is kept and training goes on; "
                f"make room on the disk: df -h {path.parent}"
            )


def _copy_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
