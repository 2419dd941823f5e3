"""Runs the trials of a sweep with Ray Tune, from the start or from where they were, and keeps the journal of them."""

from __future__ import annotations

import difflib
import logging
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import BasicVariantGenerator

from src.errors import ExitCode, Terminated, UserError
from src.reporting.sweep_journal import DIVERGED, FAILED, FINISHED, PAUSED, PRUNED, RUNNING, Journal, TrialRecord
from src.run_dir import read_metrics
from src.tuning import trainable
from src.tuning.commands import sweep_command
from src.tuning.job import STATE, Context, describe
from src.tuning.resuming import Trials
from src.tuning.settings import Trials as Settings
from src.tuning.table import SweepDisplay

log = logging.getLogger(__name__)


@dataclass
class Sweep:
    """A sweep that is under way, and what is known of it."""

    context: Context
    settings: Settings
    journal: Journal
    display: SweepDisplay
    mode: str
    max_epochs: int  # of the longest trial
    signal: int = 0  # that told it to end
    not_reported: list[str] | None = None  # where the metric is missing: what there is


_sweep: Sweep  # Tune pickles the callback below with its own state, and with it whatever it would hold


class Watcher(tune.Callback):
    """Writes down what Tune tells of its trials."""

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        plan, number = _sweep.context.plan, _number(trial)
        folder = os.path.relpath(_sweep.context.sweep_dir / str(number))
        _sweep.journal.started(number, folder, plan.params(trial.config), plan.overrides(trial.config))
        _sweep.display.changed(number)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if trainable.REPORTED in result:
            _sweep.not_reported = result[trainable.REPORTED]
            _interrupt_tune()
        elif trainable.ROW in result:
            _sweep.journal.row(_number(trial), result[trainable.ROW])
            _sweep.display.changed(_number(trial))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        log.info(f"#{_number(trial)}  its process ended ({_first_line(trial)}); it goes on in a new one")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result or {}
        if trainable.FAILED in result:
            self._end(trial, FAILED, error=result[trainable.FAILED])
        elif trainable.DIVERGED in result:
            self._end(trial, DIVERGED, error=result[trainable.DIVERGED])
        elif trainable.RETURNED in result:
            record = _sweep.journal.trials[_number(trial)]
            # A run that was pruned before is over, and returned at once when its trial was taken up again.
            pruned = record.was_pruned and max(record.rows) < _sweep.max_epochs
            self._end(trial, PRUNED if pruned else FINISHED, value=result[trainable.RETURNED])
        else:
            # A scheduler also stops what has just reported its last epoch.
            epochs = max(_sweep.journal.trials[_number(trial)].rows, default=0)
            self._end(trial, FINISHED if epochs >= _sweep.max_epochs else PRUNED)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial, FAILED, error=_first_line(trial))

    def _end(self, trial: Trial, state: str, value: float | None = None, error: str = "") -> None:
        if _number(trial) not in _sweep.journal.trials:  # its process never came up
            self.on_trial_start(0, [], trial)
        _sweep.journal.ended(_number(trial), state, value, error)
        _sweep.display.changed(_number(trial))


def run_trials(
    sweep: Sweep,
    *,
    search: Trials | BasicVariantGenerator,
    scheduler: TrialScheduler | None,
    space: dict[str, Any],
    num_samples: int,
    resources: Callable[[dict[str, Any]], tune.PlacementGroupFactory],
    at_once: int,
    state: str,
) -> None:
    """Returns when all trials have ended. at_once: how many there is room for when it begins. state: a name for Tune's own
    files; if they are there, the sweep goes on.

    Raises KeyboardInterrupt or Terminated after the trials have saved their positions; UserError where the metric is not
    reported.
    """
    global _sweep
    _sweep = sweep
    settings, context = sweep.settings, sweep.context
    os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = str(int(settings.grace_s) + 5)
    # Else Tune starts the workers of a search one after another, two seconds each. pbt's are started all at once.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(at_once) if isinstance(search, Trials) else "auto"
    mark = trainable.interruption_mark(context.sweep_dir)
    mark.unlink(missing_ok=True)
    runnable = tune.with_resources(tune.with_parameters(trainable.HydraTrial, context=context), resources)
    path = context.sweep_dir / STATE / state
    if any(path.glob("experiment_state-*")):
        tuner = _restored(path, runnable, space, again=not isinstance(search, Trials))
    else:
        shutil.rmtree(path, ignore_errors=True)  # of a sweep that was killed before Tune had saved anything
        if isinstance(search, Trials):
            search.catch_up()
        tuner = tune.Tuner(
            runnable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=context.goal.metric,
                mode=sweep.mode,
                search_alg=search,
                scheduler=scheduler,
                num_samples=num_samples,
                time_budget_s=settings.time_budget_s,
                reuse_actors=settings.reuse_actors,
                trial_dirname_creator=_directory,
            ),
            run_config=tune.RunConfig(
                name=state,
                storage_path=str(path.parent),
                verbose=0,
                callbacks=[Watcher()],
                failure_config=tune.FailureConfig(max_failures=settings.max_failures),
                # PBT copies from trials that are several exchanges ahead; with one checkpoint it is gone by then.
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4, checkpoint_at_end=False),
            ),
        )
    with sweep.display, _told_to_end(sweep, mark):
        tuner.fit()
    _after(sweep)


def _restored(path: Path, runnable: Any, space: dict[str, Any], again: bool) -> tune.Tuner:
    """again: Tune itself repeats the trials whose processes died, which else the search hands out again (`Again`)."""
    try:
        return tune.Tuner.restore(
            str(path), trainable=runnable, param_space=space, resume_unfinished=True, resume_errored=again
        )
    except Exception as error:  # whatever a file that was cut off makes of itself
        raise UserError(
            "Ray's state of this sweep cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            fix=f"rm -r {shlex.quote(str(path))} # then the same command: trials and what is finished stay",
            code=ExitCode.DAMAGED,
        ) from error


def _after(sweep: Sweep) -> None:
    """What Tune does not tell of the trials at the end, and what ended the sweep."""
    for trial in list(sweep.journal.trials.values()):
        _fill_in(sweep, trial)
        if trial.state == RUNNING:
            sweep.journal.ended(trial.number, PAUSED if sweep.signal else PRUNED)
    if sweep.not_reported is not None:
        metric, names = sweep.context.goal.metric, sweep.not_reported
        close = difflib.get_close_matches(metric, names, n=1, cutoff=0.0) or names[:1]
        raise UserError(
            f"the trials do not report {metric}" + (f"; did you mean {close[0]}?" if close else ""),
            where="metric of the sweep",
            why=f"they report: {', '.join(names)}",
            fix=sweep_command(f"metric={close[0]}") if close else "",
        )
    if sweep.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if sweep.signal:
        raise Terminated


def _fill_in(sweep: Sweep, trial: TrialRecord) -> None:
    """Epochs that were trained while nobody listened any more: an interrupted trial reports its last one to nobody."""
    metrics = sweep.context.sweep_dir / str(trial.number) / "metrics.csv"
    for row in read_metrics(metrics) if metrics.exists() else []:
        if "epoch" in row and sweep.context.goal.metric in row and int(row["epoch"]) not in trial.rows:
            sweep.journal.row(trial.number, row)


def _first_line(trial: Trial) -> str:
    """Of the error with which the process of a trial ended."""
    file = trial.pickled_error_file  # written just now; trial.get_error() looks where it is copied to later
    error = cloudpickle.loads(Path(file).read_bytes()) if file else None
    if (cause := getattr(error, "cause", None)) is not None:
        return describe(cause)
    text = str(error).strip()
    # Ray has the error of a process that could not begin only as text.
    return text.splitlines()[-1] if "raised in its creation task" in text else "it was killed, or crashed"


def _number(trial: Trial) -> int:
    return trainable.number_of(trial.trial_id, trial.config)


def _directory(trial: Trial) -> str:
    return str(_number(trial))


@contextmanager
def _told_to_end(sweep: Sweep, mark: Path) -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM has the trials save their positions, and Tune its state; the second ends at once."""

    def note(number: int, frame: FrameType | None) -> None:
        if sweep.signal:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        sweep.signal = number
        log.info(f"{signal.Signals(number).name}: the trials save their positions; Ctrl-C again ends at once")
        mark.touch()
        _interrupt_tune()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt_tune() -> None:
    """Tune saves its state and ends: its answer to this signal."""
    os.kill(os.getpid(), getattr(signal, "SIGUSR1", signal.SIGINT))
