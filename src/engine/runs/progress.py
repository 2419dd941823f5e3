"""One line per epoch, everywhere; on a terminal also a progress bar of the current epoch."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from src.engine.images.sampler import share_of
from src.engine.runs.tables import main_metric
from src.engine.runs.text import decimal, duration

log = logging.getLogger(__name__)


MOST_LINES = 50  # epochs on the screen; of a longer run every second, third, ... epoch is shown
LONG_SECONDS = 60.0  # left to train; the line of an epoch then says how long that is


class EpochLines(Checkpoint):
    """Prints the metrics of an epoch in one line. A Checkpoint callback, because those come last in a hook: other callbacks
    log their metrics in the same one."""

    def __init__(self) -> None:
        self._last = math.inf  # time.monotonic() at the end of the epoch before

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last = (
            math.inf
        )  # the first epoch of a start is short where the head learns alone or where it is continued

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics, now, number = trainer.callback_metrics, time.monotonic(), trainer.current_epoch + 1
        epochs = trainer.max_epochs or number
        left = (now - self._last) * (epochs - number)
        self._last = now
        if number % math.ceil(epochs / MOST_LINES) and number not in (1, epochs):
            return
        epoch = f"epoch {number:>{len(str(epochs))}}/{epochs}"
        speed = f"{metrics['images_per_second']:6.0f} img/s" if "images_per_second" in metrics else ""
        if trainer.is_global_zero:
            log.info(f"{epoch}  {_numbers('train', metrics)}  {_numbers('val', metrics)}  {speed}{_left(left)}")


def _left(seconds: float) -> str:
    return f"  {duration(seconds)} left" if seconds > LONG_SECONDS else ""


def _numbers(split: str, metrics: dict[str, Tensor]) -> str:
    if f"{split}/loss" not in metrics:
        return ""
    names = ["loss", *main_metric(metrics)]
    shown = [f"{name} {decimal(float(metrics[f'{split}/{name}']))}" for name in names if f"{split}/{name}" in metrics]
    return " ".join([split, *shown])


class EpochBar(L.Callback):
    """A bar of the epoch's batches that disappears when the epoch ends. Lightning's bars leave the last one behind."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        text = TextColumn("{task.description}")
        self._bar = Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
        self._bar.start()
        self._show(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} training", trainer.num_training_batches)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} validating", sum(trainer.num_val_batches))

    def _show(self, text: str, batches: float) -> None:
        if self._bar is not None:
            self._task = self._bar.add_task(text, total=batches)

    def on_train_batch_end(self, *args: Any) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    on_validation_batch_end = on_train_batch_end

    def on_train_epoch_end(self, *args: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    on_exception = on_train_epoch_end


class Throughput(L.Callback):
    """Images per second of training without validation: of the epoch (logged) and of the whole run.

    Images and seconds are part of the position, so that a run in several starts counts all of them, and steps that were
    lost in a kill in neither.
    """

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._begin: float | None = None
        self._epoch_images, self._epoch_seconds = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin = time.perf_counter()  # a run continued in mid-epoch has no on_train_epoch_start

    def state_dict(self) -> dict[str, float]:
        running = 0.0 if self._begin is None else time.perf_counter() - self._begin
        return {
            "images": self.images,
            "seconds": self.seconds,
            "epoch_images": self._epoch_images,
            "epoch_seconds": self._epoch_seconds + running,
        }

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]
        self._epoch_images, self._epoch_seconds = state_dict["epoch_images"], state_dict["epoch_seconds"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epoch_images, self._epoch_seconds = 0, 0.0
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch_images += len(batch[1]) * share_of(trainer).world

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        self.images, self.seconds = self.images + self._epoch_images, self.seconds + self._epoch_seconds
        if self._epoch_seconds > 0:
            pl_module.log("images_per_second", self._epoch_images / self._epoch_seconds, rank_zero_only=True)

    def _stop(self) -> None:
        if self._begin is not None:
            self._epoch_seconds += time.perf_counter() - self._begin
            self._begin = None

    @property
    def images_per_second(self) -> float | None:
        return round(self.images / self.seconds, 1) if self.seconds else None
