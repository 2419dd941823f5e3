"""One line per epoch, everywhere; on a terminal a progress bar of the epoch at hand below them."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


class EpochLines(Logger):
    """Prints the numbers of an epoch in one line. A Logger, since that is what sees them all, when the epoch ends."""

    def __init__(self, max_epochs: int) -> None:
        super().__init__()
        self.max_epochs = max_epochs
        self.validation: dict[str, float] = {}

    name = "console"
    version = ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "val/loss" in metrics:
            self.validation = metrics
        if "train/loss" not in metrics:
            return
        epoch = f"epoch {int(metrics['epoch']) + 1:>{len(str(self.max_epochs))}}/{self.max_epochs}"
        speed = f"{metrics['images_per_second']:6.0f} img/s" if "images_per_second" in metrics else ""
        log.info(f"{epoch}  {_numbers('train', metrics)}  {_numbers('val', self.validation)}  {speed}")
        self.validation = {}


def _numbers(split: str, metrics: dict[str, float]) -> str:
    if f"{split}/loss" not in metrics:
        return ""
    return f"{split} loss {metrics[f'{split}/loss']:.4f} acc {metrics[f'{split}/acc']:.4f}"


class EpochBar(RichProgressBar):
    """Lightning's bar, gone when the epoch ends: the epoch's line stays."""

    def __init__(self) -> None:
        super().__init__(leave=False)


class Throughput(L.Callback):
    """Images per second of training, validation not counted: of the epoch (logged) and of the whole run."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._begin: float | None = None
        self._epoch_images, self._epoch_seconds = 0, 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epoch_images, self._epoch_seconds = 0, 0.0
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch_images += len(batch[1]) * trainer.world_size

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
