"""How long training steps take, and what a rehearsal leaves for src.doctor to read: result.json."""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning as L

from src.engine.runs.job import Job
from src.engine.runs.task import RunTask


class StepClock(L.Callback):
    """The seconds of a step with the loading of its batch, in the phase that trains most: the last. The first step of an
    epoch is left out: loader processes start, and libraries choose their algorithms."""

    def __init__(self) -> None:
        self._all: list[float] = []
        self._last = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._all, self._last = [], time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """NonFinite has waited for the GPU."""
        now = time.perf_counter()
        self._all.append(now - self._last)
        self._last = now

    @property
    def seconds(self) -> float:
        return statistics.median(self._all[1:] or self._all)


def note_rehearsal(
    job: Job, task: RunTask, seconds: float, peak_mib: int | None, labels: dict[str, float | None]
) -> None:
    """Notes the time of a step, the peak of the memory, the batch size, the numbers of images, and what labels.py has found."""
    size, images = job.config.data.batch_size, task.images
    size_of_files = sum(file.stat().st_size for file in job.folder.checkpoints.iterdir())
    job.folder.finish(
        metrics={},
        step_seconds=seconds,
        peak_mib=peak_mib,
        batch_size=size,
        images=len(images.names),
        train_images=len(images.splits["train"]),
        bytes=size_of_files,
        labels=labels,
    )
