"""The best epochs and their files: best.ckpt, and epoch-0007.ckpt for each of the best k where k is more than 1."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback

from src.engine.commands.schema import METRICS
from src.engine.runs.reading import flaw, read_checkpoint

log = logging.getLogger(__name__)

BEST = "best.ckpt"


@dataclass(frozen=True)
class Score:
    """How good a validation was."""

    metric: float  # the monitored metric, negated where less is better
    loss: float  # val/loss
    epoch: int  # counted from 0

    @classmethod
    def of(cls, metrics: dict[str, Any], monitor: str, epoch: int = 0) -> Score:
        """metrics: as the validation reported them. The worst score where val/loss is not finite: with logits of nan,
        accuracy is that of the first class."""
        loss = float(metrics["val/loss"])
        if not math.isfinite(loss):
            return cls(-math.inf, math.inf, epoch)
        metric = float(metrics[monitor]) if METRICS[monitor] == "max" else -float(metrics[monitor])
        return cls(-math.inf if math.isnan(metric) else metric, loss, epoch)

    @property
    def goodness(self) -> tuple[float, float, int]:
        """Sort key, the greater the better: the metric, then the lower val/loss, then the earlier epoch."""
        return self.metric, -self.loss, -self.epoch


class BestCheckpoint(CheckpointCallback):
    """Keeps the weights of the best top_k epochs.

    Equal metrics are decided by the lower val/loss, then by the earlier epoch: on small validation sets many epochs reach
    the same accuracy, and the first of them is rarely the best. Lightning's ModelCheckpoint has no second criterion.
    """

    def __init__(self, folder: Path, monitor: str, top_k: int = 1) -> None:
        self.folder, self.monitor, self.top_k = folder, monitor, top_k
        self.kept: list[Score] = []  # the best first

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        if not math.isfinite(loss):
            if trainer.is_global_zero:
                log.warning(
                    f"val/loss of epoch {trainer.current_epoch + 1} is {loss}: it cannot become the best epoch."
                )
            return
        score = Score.of(trainer.callback_metrics, self.monitor, trainer.current_epoch)
        ranking = sorted([*self.kept, score], key=lambda score: score.goodness, reverse=True)
        self.kept, dropped = ranking[: self.top_k], ranking[self.top_k :]
        if score is self.kept[0]:
            trainer.save_checkpoint(self.folder / BEST, weights_only=True)
        if self.top_k > 1 and score in self.kept:
            trainer.save_checkpoint(epoch_file(self.folder, score.epoch), weights_only=True)
        if self.top_k > 1 and dropped and dropped[0] is not score:
            trainer.strategy.remove_checkpoint(epoch_file(self.folder, dropped[0].epoch))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A continued run has its ranking from the last position, but cannot choose an epoch whose weights are lost."""
        reasons = trainer.strategy.broadcast([why_lost(self.folder, score.epoch, self.top_k) for score in self.kept])
        lost = [why for why in reasons if why]
        if lost:
            log.warning(f"The weights of some of the best epochs are lost ({'; '.join(lost)}): others are chosen.")
            self.kept = [score for score, why in zip(self.kept, reasons, strict=True) if not why]
        kept = {epoch_file(self.folder, score.epoch) for score in self.kept}
        newest = epoch_file(self.folder, trainer.current_epoch)
        for path in self.folder.glob("epoch-*.ckpt"):  # left behind by a run that was killed
            if path not in kept and path < newest:
                trainer.strategy.remove_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [list(score.goodness) for score in self.kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = [Score(metric, -loss, -epoch) for metric, loss, epoch in state_dict["kept"]]


def epoch_file(folder: Path, epoch: int) -> Path:
    """The file with the weights of an epoch (counted from 0). In its name epochs are counted from 1, as on the screen."""
    return folder / f"epoch-{epoch + 1:04d}.ckpt"


def file_of(folder: Path, epoch: int) -> Path | None:
    """The intact file with the weights of one of the best epochs (counted from 0); None if there is none."""
    for path in (epoch_file(folder, epoch), folder / BEST):
        if flaw(path) is None and read_checkpoint(path)["epoch"] == epoch:
            return path
    return None


def why_lost(folder: Path, epoch: int, top_k: int) -> str:
    """Why the weights of a best epoch cannot be read; "" if they can."""
    if file_of(folder, epoch) is not None:
        return ""
    path = folder / BEST if top_k == 1 else epoch_file(folder, epoch)
    what = flaw(path)
    if what is None and top_k == 1 and read_checkpoint(path)["epoch"] > epoch:
        return ""  # of a later epoch, whose position was not written any more: that epoch is trained again
    return f"epoch {epoch + 1}: {path.name} {what or 'holds another epoch'}"
