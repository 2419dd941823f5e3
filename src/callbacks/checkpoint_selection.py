"""Which epochs are the best, and their files: best.ckpt, and epoch-0007.ckpt for each of the best k where k is more than 1."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback

from src.checkpoints.reading import flaw, read_checkpoint
from src.config import METRICS

log = logging.getLogger(__name__)

BEST = "best.ckpt"


class Score(NamedTuple):
    """How good a validation was: scores compare as tuples, the greater the better."""

    metric: float  # the monitored metric, its sign turned where less is better
    loss: float  # minus val/loss
    earliness: int  # minus the epoch

    @classmethod
    def of(cls, metrics: dict[str, Any], monitor: str, epoch: int = 0) -> Score:
        """metrics: what a validation reported. A value that is not a number is the worst there is."""
        sign = 1 if METRICS[monitor] == "max" else -1
        return cls(_comparable(sign * metrics[monitor]), _comparable(-metrics["val/loss"]), -epoch)

    @property
    def epoch(self) -> int:
        return -self.earliness


def _comparable(value: Any) -> float:
    return -math.inf if math.isnan(value) else float(value)


class BestCheckpoint(CheckpointCallback):
    """Keeps the weights of the best top_k epochs.

    Among epochs that are equally good the one with the lower val/loss wins, then the earlier one: on small validation
    sets many epochs reach the same accuracy, and the first of them is rarely the best. Lightning's ModelCheckpoint has no
    second criterion.
    """

    def __init__(self, folder: Path, monitor: str, top_k: int = 1) -> None:
        self.folder, self.monitor, self.top_k = folder, monitor, top_k
        self.kept: list[Score] = []  # the best first
        self._kept_before: list[Score] = []  # when best.ckpt was written last

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        # What the disk did not take only the first process knows, and all must choose alike.
        if trainer.strategy.broadcast(self.folder / BEST in trainer.strategy.checkpoint_io.failed):
            self.kept = self._kept_before
        score = Score.of(trainer.callback_metrics, self.monitor, trainer.current_epoch)
        ranking = sorted([*self.kept, score], reverse=True)
        kept_before, self.kept, dropped = self.kept, ranking[: self.top_k], ranking[self.top_k :]
        if score is self.kept[0]:
            self._kept_before = kept_before
            trainer.save_checkpoint(self.folder / BEST, weights_only=True)
        if self.top_k > 1 and score in self.kept:
            trainer.save_checkpoint(epoch_file(self.folder, score.epoch), weights_only=True)
        if self.top_k > 1 and dropped and dropped[0] is not score:
            trainer.strategy.remove_checkpoint(epoch_file(self.folder, dropped[0].epoch))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A continued run has its ranking from the last position. The best file may be newer, since it is written first;
        where it is missing, damaged or older, that epoch can be chosen no more."""
        why = trainer.strategy.broadcast(self.kept and _unusable(self.folder / BEST, self.kept[0].epoch))
        if why:
            log.warning(f"{self.folder / BEST} {why}: the best epoch is chosen among those from here on.")
            self.kept = []

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [list(score) for score in self.kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = [Score(*score) for score in state_dict["kept"]]


def epoch_file(folder: Path, epoch: int) -> Path:
    """Where the weights of an epoch are kept; epochs are counted from 1 for people, so also in the name."""
    return folder / f"epoch-{epoch + 1:04d}.ckpt"


def _unusable(path: Path, epoch: int) -> str | None:
    if (what := flaw(path)) is not None:
        return what
    return "could not be written when it was due" if read_checkpoint(path)["epoch"] < epoch else None
