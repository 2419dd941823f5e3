"""A run that is a trial of a sweep: every epoch is reported, and the sweep may end the run there."""

from __future__ import annotations

import logging
import queue
import signal
import threading
from contextlib import suppress
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback

from src.engine.runs.position import StopOnSignal
from src.engine.sweeps.trial import FINISH, INTERRUPT, Trial

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.4  # between two broadcasts while rank 0 waits: a busy driver may answer much later


class TrialReport(CheckpointCallback):
    """Reports the metrics of an epoch after its position is saved, and waits for the answer.

    On FINISH the run ends as after its last epoch: the best weights are measured and packaged. On INTERRUPT it ends as on
    SIGTERM, and goes on later. A CheckpointCallback, because Lightning calls those after all others, in the order of the
    list, in which this is the last.
    """

    stop: StopOnSignal

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.stop = next(callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.trial.finish_after is not None and trainer.current_epoch >= self.trial.finish_after:
            trainer.should_stop = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.trial.interrupted:
            self.stop.received = signal.SIGTERM

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.trial.keeps_checkpoints:
            trainer.strategy.checkpoint_io.wait()
        answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        if trainer.is_global_zero:
            row = {name: float(value) for name, value in trainer.callback_metrics.items()}
            row["epoch"] = trainer.current_epoch + 1
            threading.Thread(target=self._ask, args=(row, answers), daemon=True).start()
        answer = ""
        while not answer:
            if trainer.is_global_zero:
                with suppress(queue.Empty):
                    answer = answers.get(timeout=BEAT_SECONDS)
            # Also without an answer: the other ranks give up waiting after strategy.timeout_seconds.
            answer = trainer.strategy.broadcast(answer)
        if answer == FINISH:
            log.info(f"The sweep ends this trial at epoch {trainer.current_epoch + 1}.")
            trainer.should_stop = True
        elif answer == INTERRUPT:
            self.stop.received = signal.SIGTERM

    def _ask(self, row: dict[str, float], answers: queue.SimpleQueue[str]) -> None:
        try:
            answers.put(self.trial.report(row))
        except OSError:  # the worker is gone
            answers.put(INTERRUPT)
