"""The callbacks of a run that is a trial: every epoch is reported, and the sweep may end the run or change its settings."""

from __future__ import annotations

import logging
import queue
import signal
import threading
from contextlib import suppress
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from torch.optim.lr_scheduler import ReduceLROnPlateau

from src.engine.runs.position import StopOnSignal
from src.engine.steps.engine_module import engine_module
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


class OwnSettings(L.Callback):
    """Keeps optimizer.lr, weight_decay and momentum of this run's config, where it continues from another run's checkpoint.

    scheduler=pbt makes such trials. Lightning restores optimizer and schedule, and with them the settings of the run that
    wrote the checkpoint. What was learnt (moments, the place in the schedule, steps of plateau) stays restored. A run that
    continues from a checkpoint of its own does not change, not one bit.
    """

    def __init__(self) -> None:
        self._options: list[dict[str, Any]] = []  # of the optimizer's groups, as they were built

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The optimizer is built, and its state not restored yet."""
        self._options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in engine_module(pl_module).optimizer.param_groups
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        groups = engine_module(pl_module).optimizer.param_groups
        restored = [group["initial_lr"] for group in groups]
        for group, options in zip(groups, self._options, strict=True):
            before, now = group["initial_lr"], options["initial_lr"]
            # lr * now / before would be rounded twice where the two are equal. Of lr 0 no factor is known.
            group["lr"] = group["lr"] * (now / before) if before else now
            group |= options
        for schedule in engine_module(pl_module).schedules():
            if not isinstance(schedule, ReduceLROnPlateau):  # which has no base, and changes lr itself
                # trainer.on_nan=restore may have reduced the base, but not a group's initial_lr
                factors = [base / lr if lr else 1.0 for base, lr in zip(schedule.base_lrs, restored, strict=True)]
                schedule.base_lrs = [
                    options["initial_lr"] * factor for options, factor in zip(self._options, factors, strict=True)
                ]
