"""Saving the position in training: now and then, and when a signal ends the run, so that any run can be continued."""

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

from src.engine.processes.shared_maximum import SharedMaximum
from src.engine.runs import signals
from src.engine.runs.errors import LoaderFault, Terminated
from src.engine.runs.writing import LAST

log = logging.getLogger(__name__)

# After a signal, a batch hangs if it takes SLOWNESS times the longest batch so far and LEAST_SECONDS more. A batch that is
# still being loaded has only LOADING_SECONDS: nothing of it has been trained yet.
SLOWNESS, LEAST_SECONDS, LOADING_SECONDS = 3, 6.0, 2.0
ANSWER_SECONDS = 2.0  # that the main thread has to answer a signal


class PositionCheckpoint(CheckpointCallback):
    """Saves last.ckpt at the end of every epoch, and every n steps or minutes where configured. (Lightning's `save_last`
    copies the last checkpoint that was saved for another reason, which is not the last step.)

    Not between the last step of an epoch and its validation: a run continued from there would skip that validation, and
    with it perhaps the best epoch.
    """

    def __init__(self, folder: Path, every_n_steps: int | None = None, every_n_minutes: float | None = None) -> None:
        self.path = folder / LAST
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self._saved_at, self.saved_step = time.monotonic(), 0
        self._time_is_up: SharedMaximum

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._time_is_up = SharedMaximum(trainer.strategy)  # clocks differ, but all ranks must save at the same step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if _is_epochs_end(trainer):
            return
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if not due and self.every_n_minutes is not None:
            due = bool(self._time_is_up.exchange(time.monotonic() - self._saved_at >= 60 * self.every_n_minutes))
        if due:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at, self.saved_step = time.monotonic(), trainer.global_step


class StopOnSignal(CheckpointCallback):
    """On SIGTERM or Ctrl-C, ends training after the current step, with its position saved; Lightning's own handlers save
    nothing.

    Further signals do not disturb the save. While a batch is being loaded, which may hang, the position after the previous
    step is saved. A second signal during a step ends at once, and so does a step that takes far longer than those before.
    A signal during validation waits for its end: the steps of that epoch would be lost otherwise.

    Any rank may get the signal. All learn of it within a second, or a step or two, and stop at the same step; Lightning's
    own broadcast, for which every step waits, is switched off.

    A CheckpointCallback, because those come last in a hook: by then the other callbacks (an average of the weights) have
    processed this step.
    """

    def __init__(self, position: PositionCheckpoint) -> None:
        self.position = position
        self.received = 0  # the signal that this process got
        self._agreed = 0  # a signal that some rank got, and that all ranks know of
        self._patience = 0  # number of further Ctrl-C that do not end a save under way
        self._shared: SharedMaximum
        self._handlers = ExitStack()
        self._pace = Pace()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shared = SharedMaximum(trainer.strategy)
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
        elif number == signal.SIGINT or (not self._pace.is_over and time.monotonic() - self._pace.signalled > 1):
            self._pace.is_over = True
            signals.end_begins(number)
            signals.kill_loaders()  # most likely one hangs
            raise signals.error_of(number)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        self._pace.moved()
        self._agreed = self._shared.exchange(self.received)
        if self._agreed and not _is_epochs_end(trainer):
            self._end_begins()
            self.position.save(trainer)
            self._stop(trainer)
        self._pace.loads = trainer.world_size == 1 and not _is_epochs_end(trainer)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._pace.loads = False

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
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
        """Saves the position if a loader failed or hung between two steps. Not with several ranks: the others know nothing
        of it yet."""
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
        """Waits until the position is written, and says so."""
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
    """How long batches take; and the watch after a signal, which ends the process if no batch ends any more."""

    def __init__(self) -> None:
        self.is_over = False  # training ends, one way or the other
        self.loads = False  # between two steps: the next batch is being loaded
        self._last = 0.0  # time when a batch ended
        self._longest = 0.0  # seconds from the end of a batch to the end of the next, starting the loaders included
        self.signalled = 0.0  # time of the signal

    def moved(self) -> None:
        """Called when a batch has ended."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last if self._last else 0.0), now

    def end_where_nothing_moves(self, number: int) -> None:
        """Starts a thread that sends the signal again once a batch takes too long, and then ends the process if the main
        thread, waiting inside of a library, does not answer."""
        self.signalled = time.monotonic()
        threading.Thread(target=self._watch, args=[number], daemon=True).start()

    def _watch(self, number: int) -> None:
        while not self.is_over and time.monotonic() - max(self._last, self.signalled) < self._patience():
            time.sleep(0.1)
        if not self.is_over:
            if not self.loads:
                log.warning("no batch ends any more: what was trained since the last save is lost")
            os.kill(os.getpid(), number)
            time.sleep(ANSWER_SECONDS)
        if not self.is_over:
            signals.kill(signals.code_of(number))

    def _patience(self) -> float:
        return LOADING_SECONDS if self.loads else SLOWNESS * self._longest + LEAST_SECONDS


class StopAtMaxSteps(L.Callback):
    """Ends training after trainer.max_steps. Lightning's own max_steps leaves the epoch without validating, and a run that
    continues with it counts its epochs wrongly; should_stop validates first."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.global_step >= self.max_steps  # a run continued from its last step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True


def _is_epochs_end(trainer: L.Trainer) -> bool:
    """Whether validation comes next: after the last batch, and after the last step of trainer.max_steps."""
    return trainer.is_last_batch or trainer.should_stop
