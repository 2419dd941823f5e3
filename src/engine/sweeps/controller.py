"""run_sweep: the one way in which a sweep runs, whether its trials are jobs (launch.py) or points of a search (sweep.py).

Ray Tune runs the trials, each start of a sweep as a new experiment; what it tells of them goes to the sweep's journal.
"""

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
from typing import TYPE_CHECKING, Any

import cloudpickle
from hydra import version
from omegaconf import DictConfig
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from src.engine.commands.suggestions import did_you_mean
from src.engine.commands.user_command import named, shell_command
from src.engine.runs import signals
from src.engine.runs.errors import UserError
from src.engine.sweeps import trainable
from src.engine.sweeps.cluster import at_once, check_shared, connect, resources_of
from src.engine.sweeps.folder import is_done, open_sweep, scratch_folder, trained_rows
from src.engine.sweeps.jobs import FINISH_AFTER, HydraSweep, most_epochs
from src.engine.sweeps.progress import SweepDisplay
from src.engine.sweeps.results import conclude
from src.engine.sweeps.schedulers import keeps_checkpoints
from src.engine.sweeps.settings import SweepSettings, sweep_command
from src.engine.sweeps.source import TrialSource
from src.engine.sweeps.sweep_journal import FAILED, FINISHED, OVER, PAUSED, PRUNED, RUNNING, Goal, Journal, TrialRecord
from src.engine.sweeps.worker import Context, describe, name_of

if TYPE_CHECKING:
    from src.engine.sweeps.launch import GivenJobs
    from src.engine.sweeps.searches import SearchPoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, before anything of it is written or run."""

    goal: Goal
    points: SearchPoints | GivenJobs
    scheduler: TrialScheduler | None
    identity: dict[str, Any]  # what makes two sweeps the same, beside goal and scheduler
    configs: list[DictConfig]  # of its jobs; of a search, those that were composed to check the space
    total: int | None  # trials; None: until the time is over
    first: int = 0  # the number of the first trial; a launcher may have had other batches before
    is_whole: bool = True  # no other batch follows, so that the best trial is the sweep's winner


def run_sweep(plan: SweepPlan, settings: SweepSettings, hydra: HydraSweep) -> Journal:
    """Runs a sweep to its end, from its start or from where it was, with today's settings.

    Raises UserError; KeyboardInterrupt and Terminated after the trials have saved their positions.
    """
    folder, goal, keeps = hydra.folder, plan.goal, keeps_checkpoints(plan.scheduler)
    identity = {"metric": goal.metric, "mode": goal.mode, "scheduler": settings.scheduler, **plan.identity}
    with open_sweep(folder, identity, settings.resume) as journal:
        unfinished = [number for number, trial in journal.trials.items() if not is_done(folder, trial, keeps)]
        for number in unfinished:
            fill_in(journal, journal.trials[number], goal.metric)
        source = TrialSource(plan.points, goal, journal, plan.scheduler, unfinished)
        if source.is_done():
            log.info(f"{os.path.relpath(folder)} is finished: there is nothing left to run")
        else:
            connect(settings.ray)
            with scratch_folder(folder) as scratch:
                check_shared(folder)
                _run(plan, settings, hydra, source, scratch)
        conclude(journal, goal, settings.retrain if plan.is_whole else None)
        return journal


def _run(plan: SweepPlan, settings: SweepSettings, hydra: HydraSweep, source: TrialSource, scratch: Path) -> None:
    """Runs the trials of the source. scratch: a folder for Tune's own files."""
    limit, keeps = settings.max_concurrent, keeps_checkpoints(plan.scheduler)
    count = None if plan.total is None else plan.total - plan.first
    resources = {resources_of(config, settings, count) for config in plan.configs}
    room = max(at_once(one, limit) for one in resources)
    source.compose = lambda point, number: hydra.compose(plan.points.overrides(point), number)
    source.resources = lambda config: resources_of(config, settings, count)
    source.max_concurrent = limit or math.inf
    if len(resources) == 1 and not keeps:  # paused trials wait for others to come
        # Keep one suggestion queued beyond the current capacity, so that a joining machine starts at once; no more, because
        # later suggestions should use finished results.
        (share,) = resources
        source.room = lambda: at_once(share, None) + 1
    context = Context(
        task=name_of(hydra.task),
        hydra=hydra.context,
        version_base=str(version.getbase()),
        goal=plan.goal,
        sweep_dir=hydra.folder,
        scratch=scratch,
        keeps_checkpoints=keeps,
        changes_points=isinstance(plan.scheduler, PopulationBasedTraining),
        grace_s=settings.grace_s,
        cwd=None if settings.ray.ship_code else Path.cwd(),
        command=shell_command(),
    )
    epochs = most_epochs(plan.configs)
    display = SweepDisplay(source.journal, plan.goal, total=plan.total, max_epochs=epochs, concurrent=room)
    many = {None: "trials", 1: "1 trial"}.get(plan.total, f"{plan.total} trials")
    log.info(f"{many}, {room} at once, in {os.path.relpath(hydra.folder)}")
    os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = str(int(settings.grace_s) + 5)
    # Else Tune starts the workers of a search one after another, two seconds each. pbt's population is there at once.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(room, 200 if context.changes_points else 1))
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1e9"  # between two saves of its state, which nobody reads
    runnable = tune.with_parameters(trainable.HydraTrainable, context=context)
    runnable.__qualname__ = runnable.__name__  # what `ps` shows of a worker
    watcher = Watcher(context, settings, source, display, epochs)
    with display, signals.handled_by(watcher.on_signal):
        tune.run(
            runnable,
            name="state",
            storage_path=str(scratch),
            search_alg=source,
            scheduler=plan.scheduler,
            stop=watcher,
            callbacks=[watcher],
            max_failures=settings.max_failures,
            reuse_actors=settings.reuse_actors,
            raise_on_failed_trial=False,
            verbose=0,
            # PBT copies from trials that are several exchanges ahead; with one checkpoint it is gone by then.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4, checkpoint_at_end=False),
        )
    watcher.conclude()


class Watcher(tune.Callback, tune.Stopper):
    """Keeps the journal of what Tune tells of its trials, and ends the sweep early: by a signal, by its time, by an error."""

    def __init__(
        self,
        context: Context,
        settings: SweepSettings,
        source: TrialSource,
        display: SweepDisplay,
        max_epochs: int | None,
    ) -> None:
        """max_epochs: of the longest trial; None: not known."""
        self.context, self.settings, self.source, self.display = context, settings, source, display
        self.journal, self.max_epochs = source.journal, max_epochs or math.inf
        self.signal = 0  # that told the sweep to end
        self.over_budget = False
        self.reported: list[str] | None = None  # where the metric is missing: the names that trials report
        self.budget_end = math.inf if settings.time_budget_s is None else time.monotonic() + settings.time_budget_s
        self.deadline: float | None = (
            None  # time.monotonic() until which trials may save their positions; None: it goes on
        )
        self.busy = True  # a trial runs

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it with its own state, which nobody reads

    def end(self) -> None:
        """Has the trials save their positions and end, and begins no other."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self.settings.grace_s
            self.context.interruption_mark.touch()
            self.source.set_finished()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal has the trials save their positions, the second ends at once."""
        if self.signal:
            signals.end_begins(number)
            raise signals.error_of(number)
        self.signal = number
        log.info(f"{signal.Signals(number).name}: the trials save their positions; Ctrl-C again ends at once")
        self.end()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial stops: no Stopper decides that, but the scheduler."""
        return False

    def stop_all(self) -> bool:
        """Ends Tune's experiment when all trials have saved their positions, or had the time for it."""
        if self.deadline is None and time.monotonic() >= self.budget_end:
            self.over_budget = True
            log.info(f"time_budget_s={self.settings.time_budget_s:g} is over: the trials save their positions")
            self.end()
        return self.deadline is not None and (not self.busy or time.monotonic() > self.deadline)

    def setup(self, **info: Any) -> None:
        """Tune has just taken SIGUSR1 for itself, which SLURM may send before it ends a job."""
        for number in signals.NUMBERS:
            signal.signal(number, self.on_signal)

    def on_step_begin(self, trials: list[Trial], **info: Any) -> None:
        self.busy = self.deadline is None or any(trial.status == Trial.RUNNING for trial in trials)

    def on_trial_start(self, trial: Trial, **info: Any) -> None:
        points, number = self.source.points, int(trial.trial_id)
        folder = os.path.relpath(self.context.folder(number))
        self.journal.started(number, folder, points.params(trial.config), points.overrides(trial.config))
        self.display.changed(number)

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **info: Any) -> None:
        number = int(trial.trial_id)
        if history := result.pop(trainable.HISTORY, None):
            metric, rows = self.context.goal.metric, self.journal.trials[number].rows
            # metrics.csv has seven digits, the journal has all.
            values = {int(row["epoch"]): f"{row.get(metric, math.nan):.6g}" for row in history}
            if values != {epoch: f"{row.get(metric, math.nan):.6g}" for epoch, row in rows.items()}:
                self.journal.copied(number, history)
        if trainable.REPORTED in result:
            self.reported = result[trainable.REPORTED]
            self.end()
        elif trainable.ROW in result:
            self.journal.row(number, result[trainable.ROW])
            self.display.changed(number)

    def on_trial_recover(self, trial: Trial, **info: Any) -> None:
        log.info(f"#{trial.trial_id}  its process ended ({_first_line(trial)}); it goes on in a new one")

    def on_trial_complete(self, trial: Trial, **info: Any) -> None:
        result, record = trial.last_result or {}, self.journal.trials.get(int(trial.trial_id))
        state = result.get(trainable.STATE)  # None: the scheduler has stopped it
        if state in (None, FINISHED):  # a scheduler also stops what has just reported its last epoch
            stopped = state is None or FINISH_AFTER in trial.config
            epochs = max(record.rows, default=0) if record is not None else 0
            state = PRUNED if stopped and epochs < self.max_epochs else FINISHED
        self._end(trial, state, result.get(trainable.VALUE), result.get(trainable.ERROR, ""))

    def on_trial_error(self, trial: Trial, **info: Any) -> None:
        self._end(trial, FAILED, error=_first_line(trial))

    def _end(self, trial: Trial, state: str, value: float | None = None, error: str = "") -> None:
        number = int(trial.trial_id)
        if number not in self.journal.trials:  # its process never came up
            self.on_trial_start(trial)
        self.journal.ended(number, state, value, error)
        self.display.changed(number)

    def conclude(self) -> None:
        """Completes the journal with what Tune does not tell, and raises the error that ended the sweep."""
        sweep_dir, metric = self.context.sweep_dir, self.context.goal.metric
        for trial in list(self.journal.trials.values()):
            if trial.state in (RUNNING, PAUSED):
                fill_in(self.journal, trial, metric)
            if trial.state == RUNNING:
                self.journal.ended(trial.number, PAUSED)
            if trial.state in OVER and not is_done(sweep_dir, trial, self.context.keeps_checkpoints):
                log.warning(
                    f"#{trial.number}  had no time to measure its best weights; the next start of the sweep does that"
                )
        if (names := self.reported) is not None:
            close = difflib.get_close_matches(metric, names, n=1, cutoff=0.0) or names[:1]
            raise UserError(
                f"the trials do not report {metric}{did_you_mean(*close)}",
                where="metric of the sweep",
                why=f"they report: {', '.join(names)}",
                fix=sweep_command(f"metric={close[0]}") if close else "",
            )
        if self.signal:
            signals.end_begins(self.signal)
            raise signals.error_of(self.signal)
        if self.over_budget:
            log.info(f"time      is over after {self.settings.time_budget_s:g} s; to go on: {named(sweep_dir.name)}")


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
