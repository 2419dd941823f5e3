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
        """metrics: what a validation reported. Where the loss is not finite, no metric is worth anything: with logits of nan,
        accuracy is that of the first class."""
        if not math.isfinite(metrics["val/loss"]):
            return cls(-math.inf, -math.inf, -epoch)
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

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if not math.isfinite(trainer.callback_metrics["val/loss"]):
            if trainer.is_global_zero:
                loss = float(trainer.callback_metrics["val/loss"])
                log.warning(
                    f"val/loss of epoch {trainer.current_epoch + 1} is {loss}: it cannot become the best epoch."
                )
            return
        score = Score.of(trainer.callback_metrics, self.monitor, trainer.current_epoch)
        ranking = sorted([*self.kept, score], reverse=True)
        self.kept, dropped = ranking[: self.top_k], ranking[self.top_k :]
        if score is self.kept[0]:
            trainer.save_checkpoint(self.folder / BEST, weights_only=True)
        if self.top_k > 1 and score in self.kept:
            trainer.save_checkpoint(epoch_file(self.folder, score.epoch), weights_only=True)
        if self.top_k > 1 and dropped and dropped[0] is not score:
            trainer.strategy.remove_checkpoint(epoch_file(self.folder, dropped[0].epoch))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A continued run has its ranking from the last position. An epoch whose weights are lost can be chosen no more."""
        lost = trainer.strategy.broadcast([why_lost(self.folder, score.epoch, self.top_k) for score in self.kept])
        if any(lost):
            log.warning(
                f"The weights of some of the best epochs are lost ({'; '.join(filter(None, lost))}): others are chosen."
            )
            self.kept = [score for score, why in zip(self.kept, lost, strict=True) if not why]
        kept = {epoch_file(self.folder, score.epoch) for score in self.kept}
        newest = epoch_file(self.folder, trainer.current_epoch)
        for path in self.folder.glob("epoch-*.ckpt"):  # a run that was killed may have left more than it needs
            if path not in kept and path < newest:
                trainer.strategy.remove_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [list(score) for score in self.kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = [Score(*score) for score in state_dict["kept"]]


def epoch_file(folder: Path, epoch: int) -> Path:
    """Where the weights of an epoch are kept; epochs are counted from 1 for people, so also in the name."""
    return folder / f"epoch-{epoch + 1:04d}.ckpt"


def file_of(folder: Path, epoch: int) -> Path | None:
    """The whole file with the weights of one of the best epochs, counted from 0."""
    for path in (epoch_file(folder, epoch), folder / BEST):
        if flaw(path) is None and read_checkpoint(path)["epoch"] == epoch:
            return path
    return None


def why_lost(folder: Path, epoch: int, top_k: int) -> str:
    """What became of the file of a best epoch; "" where it can be read."""
    if file_of(folder, epoch) is not None:
        return ""
    path = folder / BEST if top_k == 1 else epoch_file(folder, epoch)
    what = flaw(path)
    if what is None and top_k == 1 and read_checkpoint(path)["epoch"] > epoch:
        return ""  # written before the position that refers to it, and that one was not written any more
    return f"epoch {epoch + 1}: {path.name} {what or 'holds another epoch'}"
