"""A run that is a trial of a sweep: every epoch is reported, and the sweep may end the run there."""

from __future__ import annotations

import logging
import signal
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback

from src.callbacks.position import StopOnSignal
from src.trial import FINISH, INTERRUPT, Trial

log = logging.getLogger(__name__)


class TrialReport(CheckpointCallback):
    """Reports the numbers of an epoch after its position is saved, and waits for the answer.

    The run that is to finish ends as after its last epoch: the best weights are measured and packaged. One that is
    interrupted ends as on SIGTERM, and goes on later. A CheckpointCallback, since those come after all others, in the
    order of the list: this is the last.
    """

    def __init__(self, trial: Trial, stop: StopOnSignal) -> None:
        self.trial, self.stop = trial, stop

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.trial.interrupted:
            self.stop.received = signal.SIGTERM

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.trial.keeps_checkpoints:
            trainer.strategy.checkpoint_io.wait()
        answer = ""
        if trainer.is_global_zero:
            row = {name: float(value) for name, value in trainer.callback_metrics.items()}
            answer = self.trial.report(row | {"epoch": trainer.current_epoch + 1})
        answer = trainer.strategy.broadcast(answer)
        if answer == FINISH:
            log.info(f"The sweep ends this trial at epoch {trainer.current_epoch + 1}.")
            trainer.should_stop = True
        elif answer == INTERRUPT:
            self.stop.received = signal.SIGTERM
