"""trainer.patience: a run ends where more epochs bring nothing. And which setting ended a run, for result.json."""

from __future__ import annotations

import logging

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer

from src.engine.commands.schema import METRICS
from src.engine.runs.position import StopAtMaxSteps
from src.engine.runs.selection import find_callback
from src.engine.runs.text import plural

log = logging.getLogger(__name__)


class Patience(EarlyStopping):
    """Ends training after `patience` epochs in which `monitor` has not improved by more than min_delta.

    first_epoch: of the last freezing phase, counted from 0. Earlier epochs do not count: the best of a phase says nothing
    about the blocks that the next one unfreezes.
    """

    def __init__(self, monitor: str, patience: int, min_delta: float, first_epoch: int) -> None:
        mode = METRICS.get(monitor, "max")
        super().__init__(monitor, min_delta, patience, mode=mode, check_finite=False)
        self.first_epoch = first_epoch

    @property
    def is_exhausted(self) -> bool:
        return self.wait_count >= self.patience

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        earliest = self.first_epoch + 1 + self.patience  # the first epoch sets the value to improve on
        if trainer.is_global_zero and trainer.max_epochs is not None and earliest >= trainer.max_epochs:
            log.warning(
                f"trainer.patience={self.patience} has no effect: it counts from epoch {self.first_epoch + 1} on, the first of "
                f"the last freezing phase, and trainer.max_epochs={trainer.max_epochs} ends the run before it can."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that was killed after its last epoch trains no further one."""
        if self.is_exhausted:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch >= self.first_epoch:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_exhausted and trainer.is_global_zero:
            log.info(f"no better {self.monitor} in {plural(self.wait_count, 'epoch')}: trainer.patience ends the run")


def ended_by(trainer: L.Trainer) -> str | None:
    """The setting that ended training, such as trainer.patience; None for a callback of the owner's, and without training."""
    if trainer.current_epoch == trainer.max_epochs:
        return "trainer.max_epochs"
    if (patience := find_callback(trainer, Patience)) is not None and patience.is_exhausted:
        return "trainer.patience"
    if (limit := find_callback(trainer, StopAtMaxSteps)) is not None and trainer.global_step >= limit.max_steps:
        return "trainer.max_steps"
    timer = find_callback(trainer, Timer)
    left = None if timer is None else timer.time_remaining()
    return "trainer.max_time" if left is not None and left <= 0 else None
