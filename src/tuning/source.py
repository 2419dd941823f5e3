"""TrialSource: what Tune takes the trials of a sweep from, in its first start as in its tenth.

All that it knows of earlier starts it reads from the sweep's journal: the trials that are not done come first, under their
numbers; the search and the scheduler are told what the others came to; then there are new points.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.search_algorithm import SearchAlgorithm

from src.reporting.goal import Goal
from src.reporting.sweep_journal import FAILED, FINISHED, NOT_RANKED, OVER, PRUNED, Journal, TrialRecord
from src.tuning import trainable
from src.tuning.job import FINISH_AFTER, JOB
from src.tuning.points import Point, Points

log = logging.getLogger(__name__)


class Plan(Protocol):
    """What the trials of a sweep are: a Space, or the jobs that Hydra gave to the launcher."""

    def overrides(self, point: Mapping[str, Any]) -> list[str]:
        """The command line of a trial."""

    def params(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """What differs between the trials: key -> value."""


class TrialSource(SearchAlgorithm):
    """The trials of a sweep, whose ids are their numbers.

    No Searcher, since pbt refuses those, and since a trial that goes on must have the id under which the scheduler knows it.
    """

    def __init__(self, plan: Plan, goal: Goal, points: Points | None = None, jobs: Sequence[int] = ()) -> None:
        """points: of a search; jobs: the numbers of those that are given, where there is none."""
        self.plan, self.goal, self.points, self.jobs = plan, goal, points, jobs
        self.waiting: list[Point] = []  # of earlier starts, or given
        self.live: set[str] = set()
        self.most: int | None = None  # trials that are handed out and not complete, as the user says
        self.room: Callable[[], float] = lambda: math.inf  # and as the machines have room for
        self.shares: Callable[[Point], tune.PlacementGroupFactory]

    def take_up(self, journal: Journal, scheduler: TrialScheduler | None, begun: Collection[int]) -> None:
        """Before Tune is asked to run anything. begun: the trials of the journal of which something is left to do."""
        self.journal, self.scheduler = journal, scheduler
        mine = {number: one for number, one in sorted(journal.trials.items()) if self.points or number in self.jobs}
        reader: Any = self.points or self.plan
        points = {number: {JOB: number} | reader.read(one) for number, one in mine.items()}
        begun = [number for number in mine if number in begun]
        if self.points is not None:
            self.points.take_up(points, {number: self._value(mine[number]) for number in mine if number not in begun})
            limit = self.points.limit if self.points.limit is not None else math.inf
            if left := [number for number in begun if number >= limit]:
                log.info(f"num_samples={limit}: trials from #{left[0]} on, which were begun, stay as they are")
            begun = [number for number in begun if number < limit]
        for number in begun:
            ended = mine[number].state in (FINISHED, PRUNED)
            self.waiting.append(points[number] | ({FINISH_AFTER: max(mine[number].rows, default=0)} if ended else {}))
        self.waiting += [{JOB: number} for number in self.jobs if number not in mine]

    def is_done(self) -> bool:
        """Whether there is nothing to run."""
        return not self.waiting and (self.points is None or self.points.is_over())

    def add_configurations(self, experiments: Sequence[Experiment]) -> None:
        (self.experiment,) = experiments
        self._begun = {point[JOB]: self._trial(point) for point in self.waiting}
        if self.journal.trials:
            self._tell_scheduler()

    def next_trial(self) -> Trial | None:
        if self.is_finished() or len(self.live) >= min(self.most or math.inf, self.room()):
            return None
        if self.waiting:
            trial = self._begun[self.waiting.pop(0)[JOB]]
        else:
            point = self.points.suggest() if self.points is not None else Searcher.FINISHED
            if not isinstance(point, dict):
                if point == Searcher.FINISHED:
                    self.set_finished()
                return None
            trial = self._trial(point)
        self.live.add(trial.trial_id)
        return trial

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self.points is not None:
            self.points.report(int(trial_id), result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.live.discard(trial_id)
        record = self.journal.trials.get(int(trial_id))
        if self.points is None or record is None:
            return
        result = result or {}
        failed = error or trainable.FAILED in result or trainable.INTERRUPTED in result
        value = self.goal.worst if trainable.DIVERGED in result else self._value(record, result.get(self.goal.metric))
        self.points.complete(int(trial_id), None if failed else value)

    def _trial(self, point: Point) -> Trial:
        spec = self.experiment.spec
        return Trial(
            spec["run"],
            config=dict(point),
            trial_id=str(point[JOB]),
            storage=spec["storage"],
            checkpoint_config=spec["checkpoint_config"],
            max_failures=spec["max_failures"],
            placement_group_factory=self.shares(point),
            trial_dirname_creator=_directory,
        )

    def _value(self, trial: TrialRecord, returned: float | None = None) -> float | None:
        """What the search learns of a trial: its best value, as in the ranking; None: it failed."""
        if trial.state in NOT_RANKED:
            return None if trial.state == FAILED else self.goal.worst
        best = trial.best(self.goal)
        return best[0] if best is not None else self.goal.finite(returned)

    def _tell_scheduler(self) -> None:
        """Has the scheduler decide again about every row so far, in the order in which they came, as if nothing had happened.

        A trial that was killed when the scheduler had just ended it is ended there.
        """
        if not isinstance(self.scheduler, ASHAScheduler | MedianStoppingRule):
            if self.scheduler is not None and not isinstance(self.scheduler, PopulationBasedTraining):
                ended = sum(one.state in OVER for one in self.journal.trials.values())
                log.warning(
                    f"{type(self.scheduler).__name__} begins anew: it compares new trials, and those that go on, with each "
                    f"other, and not with the {ended} that have ended"
                )
            return
        nobody: Any = _Nobody()
        trials = {number: Trial("", stub=True, trial_id=str(number)) for number in self.journal.trials} | self._begun
        for trial in trials.values():
            self.scheduler.on_trial_add(nobody, trial)
        last = {number: max(one.rows, default=0) for number, one in self.journal.trials.items()}
        ended = set()
        for number, epoch in self.journal.order:
            over = number not in self._begun
            if number in ended or not (epoch or (over and last[number])):
                continue
            trial, row = trials[number], self._row(number, epoch or last[number])
            # Of a trial that is over, median takes a row so too, without deciding again, which takes it long.
            if epoch == 0 or (over and isinstance(self.scheduler, MedianStoppingRule)):
                self.scheduler.on_trial_complete(nobody, trial, row)
                ended |= {number} if epoch == 0 else set()
            elif self.scheduler.on_trial_result(nobody, trial, row) == TrialScheduler.STOP and not over:
                ended.add(number)
                if epoch == last[number]:
                    trial.config.setdefault(FINISH_AFTER, epoch)

    def _row(self, number: int, epoch: int) -> dict[str, float]:
        row = self.journal.trials[number].rows[epoch]
        return {**row, self.goal.metric: self.goal.finite(row.get(self.goal.metric))}


class _Nobody:
    """Stands for Tune's controller while a scheduler is told of what was: nothing runs, nothing is paused."""

    def get_live_trials(self) -> list[Trial]:
        return []


def _directory(trial: Trial) -> str:
    return trial.trial_id
