"""Which checkpoints a run keeps: best.ckpt, the weights of the best epoch, and last.ckpt, the position to continue from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.callbacks import ModelCheckpoint

from src.config import METRICS, Checkpoint


class BestCheckpoint(CheckpointCallback):
    """Saves the weights after a validation that is better than all before.

    Among epochs that are equally good the one with the lower val/loss wins, then the earlier one: on small validation
    sets many epochs reach the same accuracy, and the first of them is rarely the best. Lightning's ModelCheckpoint has no
    second criterion.
    """

    def __init__(self, path: Path, monitor: str) -> None:
        self.path, self.monitor = path, monitor
        self.best: tuple[float, float] | None = None  # (the metric, turned so that more is better; minus the loss)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        sign = 1 if METRICS[self.monitor] == "max" else -1
        score = _rank(sign * trainer.callback_metrics[self.monitor]), _rank(-trainer.callback_metrics["val/loss"])
        if self.best is None or score > self.best:
            self.best = score
            trainer.save_checkpoint(self.path, weights_only=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"] and tuple(state_dict["best"])


def _rank(value: Any) -> float:
    """A number that compares: a loss that is not a number is the worst there is."""
    return -math.inf if math.isnan(value) else float(value)


class PositionCheckpoint(ModelCheckpoint):
    """Saves every n steps, but not after the last step of an epoch: a run that continues from there would skip the
    validation of that epoch, and with it perhaps the best one. The save at the end of the epoch follows at once."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def build_checkpoints(config: Checkpoint, folder: Path) -> list[L.Callback]:
    """The callbacks that write best.ckpt and last.ckpt into the folder."""
    common: dict[str, Any] = {"dirpath": folder, "filename": "last", "enable_version_counter": False}
    callbacks: list[L.Callback] = [
        BestCheckpoint(folder / "best.ckpt", config.monitor),
        ModelCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True, **common),
    ]
    if config.every_n_steps is not None:
        callbacks.append(PositionCheckpoint(every_n_train_steps=config.every_n_steps, **common))
    return callbacks
