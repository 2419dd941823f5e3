"""Runs the trials of a sweep with Ray Tune and keeps the journal of them. Each start of a sweep is a new experiment to Tune."""

from __future__ import annotations

import difflib
import logging
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from src.engine.commands.suggestions import did_you_mean
from src.engine.commands.user_command import named
from src.engine.runs import signals
from src.engine.runs.errors import UserError
from src.engine.sweeps import trainable
from src.engine.sweeps.commands import sweep_command
from src.engine.sweeps.folder import is_done, trained_rows
from src.engine.sweeps.jobs import FINISH_AFTER
from src.engine.sweeps.progress import SweepDisplay
from src.engine.sweeps.settings import SweepSettings
from src.engine.sweeps.source import TrialSource
from src.engine.sweeps.sweep_journal import (
    DIVERGED,
    FAILED,
    FINISHED,
    OVER,
    PAUSED,
    PRUNED,
    RUNNING,
    Journal,
    TrialRecord,
)
from src.engine.sweeps.worker import Context, describe

log = logging.getLogger(__name__)


@dataclass
class Sweep:
    """A sweep under way, and what ends it."""

    context: Context
    settings: SweepSettings
    display: SweepDisplay
    source: TrialSource
    max_epochs: int  # of the longest trial
    room: int  # for trials at once, when it begins
    signal: int = 0  # that told it to end
    over_budget: bool = False
    reported: list[str] | None = None  # where the metric is missing: the names that trials report
    deadline: float | None = None  # time.monotonic() until which its trials may save their positions; None: it goes on
    busy: bool = True  # a trial runs

    @property
    def journal(self) -> Journal:
        return self.source.journal

    def end(self) -> None:
        """Has the trials save their positions and end, and begins no other."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self.settings.grace_s
            trainable.interruption_mark(self.context).touch()
            self.source.set_finished()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal has the trials save their positions, the second ends at once."""
        if self.signal:
            signals.end_begins(number)
            raise signals.error_of(number)
        self.signal = number
        log.info(f"{signal.Signals(number).name}: the trials save their positions; Ctrl-C again ends at once")
        self.end()


class Ending(tune.Stopper):
    """Ends Tune's experiment when all trials have saved their positions, or had the time for it."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        budget = sweep.settings.time_budget_s
        self.end = None if budget is None else time.monotonic() + budget

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        sweep = self.sweep
        if sweep.deadline is None:
            if self.end is None or time.monotonic() < self.end:
                return False
            sweep.over_budget = True
            log.info(f"time_budget_s={sweep.settings.time_budget_s:g} is over: the trials save their positions")
            sweep.end()
        return not sweep.busy or time.monotonic() > sweep.deadline

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it with its own state, which nobody reads


class Watcher(tune.Callback):
    """Keeps the journal of what Tune tells of its trials."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.journal = sweep, sweep.journal

    def setup(self, **info: Any) -> None:
        """Tune has just taken SIGUSR1 for itself, which SLURM may send before it ends a job."""
        for number in signals.NUMBERS:
            signal.signal(number, self.sweep.on_signal)

    def on_step_begin(self, trials: list[Trial], **info: Any) -> None:
        self.sweep.busy = self.sweep.deadline is None or any(trial.status == Trial.RUNNING for trial in trials)

    def on_trial_start(self, trial: Trial, **info: Any) -> None:
        points, number = self.sweep.source.points, int(trial.trial_id)
        folder = os.path.relpath(self.sweep.context.sweep_dir / str(number))
        self.journal.started(number, folder, points.params(trial.config), points.overrides(trial.config))
        self.sweep.display.changed(number)

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **info: Any) -> None:
        number = int(trial.trial_id)
        if history := result.pop(trainable.HISTORY, None):
            metric, rows = self.sweep.context.goal.metric, self.journal.trials[number].rows
            # metrics.csv has seven digits, the journal has all.
            values = {int(row["epoch"]): f"{row.get(metric, math.nan):.6g}" for row in history}
            if values != {epoch: f"{row.get(metric, math.nan):.6g}" for epoch, row in rows.items()}:
                self.journal.copied(number, history)
        if trainable.REPORTED in result:
            self.sweep.reported = result[trainable.REPORTED]
            self.sweep.end()
        elif trainable.ROW in result:
            self.journal.row(number, result[trainable.ROW])
            self.sweep.display.changed(number)

    def on_trial_recover(self, trial: Trial, **info: Any) -> None:
        log.info(f"#{trial.trial_id}  its process ended ({_first_line(trial)}); it goes on in a new one")

    def on_trial_complete(self, trial: Trial, **info: Any) -> None:
        result = trial.last_result or {}
        record = self.journal.trials.get(int(trial.trial_id))
        epochs = max(record.rows, default=0) if record is not None else 0
        if trainable.FAILED in result:
            self._end(trial, FAILED, error=result[trainable.FAILED])
        elif trainable.DIVERGED in result:
            self._end(trial, DIVERGED, error=result[trainable.DIVERGED])
        elif trainable.INTERRUPTED in result:
            self._end(trial, PAUSED)
        elif trainable.RETURNED in result:
            pruned = FINISH_AFTER in trial.config and epochs < self.sweep.max_epochs
            self._end(trial, PRUNED if pruned else FINISHED, value=result[trainable.RETURNED])
        else:  # A scheduler also stops what has just reported its last epoch.
            self._end(trial, FINISHED if epochs >= self.sweep.max_epochs else PRUNED)

    def on_trial_error(self, trial: Trial, **info: Any) -> None:
        self._end(trial, FAILED, error=_first_line(trial))

    def _end(self, trial: Trial, state: str, value: float | None = None, error: str = "") -> None:
        number = int(trial.trial_id)
        if number not in self.journal.trials:  # its process never came up
            self.on_trial_start(trial)
        self.journal.ended(number, state, value, error)
        self.sweep.display.changed(number)


def run_trials(sweep: Sweep, scheduler: TrialScheduler | None) -> None:
    """Returns when all trials have ended, or the time is over.

    Raises KeyboardInterrupt or Terminated after the trials have saved their positions; UserError where the metric is not
    reported.
    """
    settings, context = sweep.settings, sweep.context
    os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = str(int(settings.grace_s) + 5)
    # Else Tune starts the workers of a search one after another, two seconds each. pbt's population is there at once.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(sweep.room, 200 if context.changes_points else 1))
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1e9"  # between two saves of its state, which nobody reads
    runnable = tune.with_parameters(trainable.HydraTrainable, context=context)
    runnable.__qualname__ = runnable.__name__  # what `ps` shows of a worker
    with sweep.display, signals.handled_by(sweep.on_signal):
        tune.run(
            runnable,
            name="state",
            storage_path=str(context.scratch),
            search_alg=sweep.source,
            scheduler=scheduler,
            stop=Ending(sweep),
            callbacks=[Watcher(sweep)],
            max_failures=settings.max_failures,
            reuse_actors=settings.reuse_actors,
            raise_on_failed_trial=False,
            verbose=0,
            # PBT copies from trials that are several exchanges ahead; with one checkpoint it is gone by then.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4, checkpoint_at_end=False),
        )
    _after(sweep)


def _after(sweep: Sweep) -> None:
    """Completes the journal with what Tune does not tell, and raises the error that ended the sweep."""
    for trial in list(sweep.journal.trials.values()):
        if trial.state in (RUNNING, PAUSED):
            fill_in(sweep.journal, trial, sweep.context.goal.metric)
        if trial.state == RUNNING:
            sweep.journal.ended(trial.number, PAUSED)
        if trial.state in OVER and not is_done(sweep.context.sweep_dir, trial, sweep.context.keeps_checkpoints):
            log.warning(
                f"#{trial.number}  had no time to measure its best weights; the next start of the sweep does that"
            )
    if sweep.reported is not None:
        metric, names = sweep.context.goal.metric, sweep.reported
        close = difflib.get_close_matches(metric, names, n=1, cutoff=0.0) or names[:1]
        raise UserError(
            f"the trials do not report {metric}{did_you_mean(*close)}",
            where="metric of the sweep",
            why=f"they report: {', '.join(names)}",
            fix=sweep_command(f"metric={close[0]}") if close else "",
        )
    if sweep.signal:
        signals.end_begins(sweep.signal)
        raise signals.error_of(sweep.signal)
    if sweep.over_budget:
        log.info(
            f"time      is over after {sweep.settings.time_budget_s:g} s; to go on: {named(sweep.context.sweep_dir.name)}"
        )


def fill_in(journal: Journal, trial: TrialRecord, metric: str) -> None:
    """Adds epochs of metrics.csv that the journal lacks: an interrupted trial trains its last epoch after Tune has gone."""
    for row in trained_rows(journal.path.parent / str(trial.number)):
        if metric in row and int(row["epoch"]) not in trial.rows:
            journal.row(trial.number, row)


def _first_line(trial: Trial) -> str:
    """The first line of the error with which the process of a trial ended."""
    file = trial.pickled_error_file  # written just now; trial.get_error() looks where it is copied to later
    error = cloudpickle.loads(Path(file).read_bytes()) if file else None
    if (cause := getattr(error, "cause", None)) is not None:
        return describe(cause)
    text = str(error).strip()
    # Ray has the error of a process that could not begin only as text.
    return text.splitlines()[-1] if "raised in its creation task" in text else "it was killed, or crashed"
