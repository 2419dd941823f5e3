"""The position in training: saved so that a run that ends in any way goes on from there, and saved when it is told to end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback

from src import signals
from src.checkpoints.writing import LAST
from src.errors import LoaderFault, Terminated
from src.strategies.requests import SharedNumber

log = logging.getLogger(__name__)

# After a signal, a batch that takes 3 times the longest so far and 6 seconds more hangs. One that is still being loaded is
# not waited for that long: nothing of it has been trained yet.
PATIENCE, LEAST, LOADING = 3, 6.0, 2.0
ANSWER_SECONDS = 2.0  # that the main thread has to answer a signal


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
        self._time_is_up = SharedNumber(trainer.strategy)  # no two processes have the same clock, and all save together

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
    """On SIGTERM or Ctrl-C training ends after the step at hand, with its position saved. Signals that follow while it is
    saved change nothing. While a batch is being loaded, which may hang, the position after the step before is saved. A
    second signal while a step goes on ends at once, and so does a step that takes far longer than those before it.

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
        self._handlers = ExitStack()
        self._pace = Pace()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shared = SharedNumber(trainer.strategy)
        self.position.saved_step = trainer.global_step
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._handlers.enter_context(signals.handled_by(self._note))

    def _note(self, number: int, frame: FrameType | None) -> None:
        number = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if not self.received:
            self.received = number
            if not self._pace.is_over:
                again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                log.info(f"{signal.Signals(number).name}: stopping as soon as the position can be saved{again}")
                self._pace.end_where_nothing_moves(number)
        elif self._pace.is_over and number == signal.SIGINT and self._patience:
            self._patience -= 1
        elif number == signal.SIGINT or (not self._pace.is_over and self._pace.seconds_waited() > 1):
            self._pace.is_over = True
            signals.end_begins(number)
            signals.kill_loaders()  # most likely one hangs
            raise signals.error_of(number)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pace.moved()
        self._agreed = self._shared.exchange(self.received)
        if self._agreed and not _is_epochs_end(trainer):
            self._end_begins()
            self.position.save(trainer)
            self._stop(trainer)
        self._pace.loads = trainer.world_size == 1 and not _is_epochs_end(trainer)

    def on_train_batch_start(self, *arguments: Any) -> None:
        self._pace.loads = False

    def on_validation_batch_end(self, *arguments: Any) -> None:
        self._pace.moved()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace.moved()
        self._agreed = self._shared.settle(self.received)  # the epoch before ended with a save
        if self._agreed:
            self._stop(trainer)
        self._pace.loads = trainer.world_size == 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace.is_over = True
        trainer.strategy.checkpoint_io.wait()  # a signal that comes meanwhile must not end the save
        self._agreed = self._shared.settle(self.received)
        if self._agreed:
            self._stop(trainer)
        self._handlers.close()
        if self.received:  # since then
            raise signals.error_of(self.received)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A loader fails, or does not end, between two steps. With several processes nothing is saved: the others know
        nothing of it yet."""
        self._pace.is_over = True
        try:
            between_steps = self._pace.loads and isinstance(exception, LoaderFault | KeyboardInterrupt | Terminated)
            if between_steps and trainer.global_step > self.position.saved_step:
                self.position.save(trainer)
                self._say_stopped(trainer)
            trainer.strategy.checkpoint_io.wait()
        finally:
            self._handlers.close()

    def _end_begins(self) -> None:
        self._pace.is_over, self._patience = True, 1
        signals.end_begins(self._agreed)

    def _stop(self, trainer: L.Trainer) -> None:
        self._end_begins()
        self._say_stopped(trainer)
        raise signals.error_of(self._agreed)

    def _say_stopped(self, trainer: L.Trainer) -> None:
        """Says that the position is saved when it is."""
        trainer.strategy.checkpoint_io.wait()
        if self.position.path in trainer.strategy.checkpoint_io.unwritten:
            log.warning(
                f"stopped at step {trainer.global_step}, whose position could not be written: make room on the disk, then "
                "repeat the command. It goes on from the position before, with the same result."
            )
        else:  # the other processes do not know
            saved = f"; the position is in {self.position.path}" if trainer.is_global_zero else ""
            log.info(f"stopped at step {trainer.global_step}{saved}")


class Pace:
    """How long batches take, and what follows when none ends any more after a signal."""

    def __init__(self) -> None:
        self.is_over = False  # training ends, one way or the other
        self.loads = False  # between two steps: the next batch is being loaded
        self._last = 0.0  # when a batch ended
        self._longest = 0.0  # from the end of a batch to the next; the first one waits for the loaders to start
        self._told_at = 0.0

    def moved(self) -> None:
        """A batch has ended."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last if self._last else 0.0), now

    def seconds_waited(self) -> float:
        """Since the signal."""
        return time.monotonic() - self._told_at

    def end_where_nothing_moves(self, number: int) -> None:
        """After a signal: a thread sends it again once a batch takes too long, and ends the process where not even that is
        answered, since the main thread waits in a library."""
        self._told_at = time.monotonic()
        threading.Thread(target=self._watch, args=[number], daemon=True).start()

    def _watch(self, number: int) -> None:
        while not self.is_over and time.monotonic() - max(self._last, self._told_at) < self._patience():
            time.sleep(0.1)
        if not self.is_over:
            if not self.loads:
                log.warning("no batch ends any more: what was trained since the last save is lost")
            os.kill(os.getpid(), number)
            time.sleep(ANSWER_SECONDS)
        if not self.is_over:
            signals.kill(signals.code_of(number))

    def _patience(self) -> float:
        return LOADING if self.loads else PATIENCE * self._longest + LEAST


def _is_epochs_end(trainer: L.Trainer) -> bool:
    """Whether the validation comes next: after the last batch, or after the last step that trainer.max_steps allows."""
    return trainer.is_last_batch or trainer.should_stop
