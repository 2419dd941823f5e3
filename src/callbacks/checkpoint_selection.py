"""Which checkpoints a run keeps: best.ckpt, the weights of the best epoch, and last.ckpt, the position to continue from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from src.config import METRICS, Checkpoint


class PositionCheckpoint(ModelCheckpoint):
    """Saves every n steps, but not after the last step of an epoch: a run that continues from there would skip the
    validation of that epoch, and with it perhaps the best one. The save at the end of the epoch follows at once."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def build_checkpoints(config: Checkpoint, folder: Path) -> list[ModelCheckpoint]:
    """The callbacks that write best.ckpt and last.ckpt into the folder. Among equally good epochs the first is kept."""
    common: dict[str, Any] = {"dirpath": folder, "auto_insert_metric_name": False, "enable_version_counter": False}
    mode = METRICS[config.monitor]
    best = ModelCheckpoint(filename="best", monitor=config.monitor, mode=mode, save_weights_only=True, **common)
    last = [ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **common)]
    if config.every_n_steps is not None:
        last.append(PositionCheckpoint(filename="last", every_n_train_steps=config.every_n_steps, **common))
    return [best, *last]
