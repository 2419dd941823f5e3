"""The position in training: saved so that a run that ends in any way goes on from there, and saved when it is told to end."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback

from src.checkpoints.writing import LAST
from src.errors import LoaderFault, Terminated
from src.strategies.requests import SharedNumber

log = logging.getLogger(__name__)


class PositionCheckpoint(CheckpointCallback):
    """Saves last.ckpt at the end of every epoch, and every n steps or minutes where that is asked for.

    Lightning's own `save_last` is a copy of the last checkpoint that was chosen for another reason, not of the last step.

    Not saved after the last step of an epoch, before its validation: a run that continues from there would skip that
    validation, and with it perhaps the best epoch. The save at the end of the epoch follows.
    """

    def __init__(self, folder: Path, every_n_steps: int | None = None, every_n_minutes: float | None = None) -> None:
        self.path = folder / LAST
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self._saved_at, self.saved_step = time.monotonic(), 0
        self._time_is_up: SharedNumber

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._time_is_up = SharedNumber()  # no two processes have the same clock, and all save together

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not _is_epochs_end(trainer) and self._is_due(trainer.global_step):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at, self.saved_step = time.monotonic(), trainer.global_step

    def _is_due(self, step: int) -> bool:
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None:
            return False
        return bool(self._time_is_up.exchange(time.monotonic() - self._saved_at >= 60 * self.every_n_minutes))


class StopOnSignal(CheckpointCallback):
    """On SIGTERM or Ctrl-C training ends after the step at hand, with its position saved. A second Ctrl-C ends at once.

    A signal that comes during validation waits for its end: the steps of that epoch would be lost otherwise. Lightning's
    own handlers save nothing. A CheckpointCallback, since those come after all others in a hook: what the others keep
    (an average of the weights) has this step in it then.

    Of several processes any may get the signal. All learn of it within a second, or a step or two, and stop at the same
    step. Lightning's own way, a broadcast that every step waits for, is switched off.
    """

    def __init__(self, position: PositionCheckpoint) -> None:
        self.position = position
        self.received = 0  # the signal that this process got
        self._agreed = 0  # the signal that some process got, which all know of
        self._patience = 0  # how many more Ctrl-C do not end a save that is under way
        self._shared: SharedNumber
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shared = SharedNumber()
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if self._is_main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)

    def _is_main_thread(self) -> bool:
        """No other thread may set handlers."""
        return threading.current_thread() is threading.main_thread()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            if not self._patience:
                raise KeyboardInterrupt
            self._patience -= 1
        self.received = number
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        log.info(f"{signal.Signals(number).name}: stopping as soon as the position can be saved{again}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._agreed = self._shared.exchange(self.received)
        if self._agreed and not _is_epochs_end(trainer):
            self._patience = 1
            self.position.save(trainer)
            self._stop(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._agreed = self._shared.settle(self.received)  # the epoch before ended with a save
        if self._agreed:
            self._stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.checkpoint_io.wait()  # a signal that comes meanwhile must not end the save
        self._restore()
        self._agreed = self._shared.settle(self.received)
        if self._agreed:
            self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A loader fails between two steps. With several processes nothing is saved: the others know nothing of it yet."""
        try:
            between_steps = isinstance(exception, LoaderFault) and trainer.training and trainer.world_size == 1
            if between_steps and trainer.global_step > self.position.saved_step:
                self.position.save(trainer)
                self._say_stopped(trainer)
            trainer.strategy.checkpoint_io.wait()
        finally:
            self._restore()

    def _stop(self, trainer: L.Trainer) -> None:
        self._patience = 1
        self._say_stopped(trainer)
        raise Terminated if self._agreed == signal.SIGTERM else KeyboardInterrupt

    def _say_stopped(self, trainer: L.Trainer) -> None:
        """Says that the position is saved when it is."""
        trainer.strategy.checkpoint_io.wait()
        if self.position.path in trainer.strategy.checkpoint_io.unwritten:
            log.warning(
                f"stopped at step {trainer.global_step}, whose position could not be written: make room on the disk, then "
                "repeat the command. It goes on from the position before, with the same result."
            )
        elif trainer.is_global_zero:
            log.info(f"stopped at step {trainer.global_step}; the position is in {self.position.path}")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _is_epochs_end(trainer: L.Trainer) -> bool:
    """Whether the validation comes next: after the last batch, or after the last step that trainer.max_steps allows."""
    return trainer.is_last_batch or trainer.should_stop
