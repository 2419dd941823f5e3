"""TrialSource: where Tune takes the trials of a sweep from, in the first start of the sweep as in the tenth.

All that it knows of earlier starts it reads from the sweep's journal: the trials that are not done come first, under their
numbers; the search and the scheduler are told the results of the others; then there are new points.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from ray import tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.search_algorithm import SearchAlgorithm

from src.engine.sweeps import trainable
from src.engine.sweeps.jobs import CONFIG, FINISH_AFTER, JOB, packed
from src.engine.sweeps.sweep_journal import (
    DIVERGED,
    FAILED,
    FINISHED,
    NOT_RANKED,
    OVER,
    PAUSED,
    PRUNED,
    Goal,
    Journal,
    TrialRecord,
)

if TYPE_CHECKING:
    from src.engine.sweeps.launch import GivenJobs
    from src.engine.sweeps.searches import SearchPoints

log = logging.getLogger(__name__)

Point = dict[str, Any]


class SweepTrial(Trial):
    """A trial whose config holds, beside its point, the packed config of its job."""

    def __init__(
        self,
        point: Point,
        compose: Callable[[Point, int], DictConfig],
        resources: Callable[[DictConfig], tune.PlacementGroupFactory],
        **settings: Any,
    ) -> None:
        config = compose(point, point[JOB])
        super().__init__(
            trial_id=str(point[JOB]),
            config=point | {CONFIG: packed(config)},
            placement_group_factory=resources(config),
            trial_dirname_creator=lambda trial: trial.trial_id,
            **settings,
        )
        self.compose = compose

    def set_config(self, config: Point) -> None:
        """pbt calls it with the changed point of another trial."""
        number = int(self.trial_id)
        point = {key: value for key, value in config.items() if key != CONFIG} | {JOB: number}
        super().set_config(point | {CONFIG: packed(self.compose(point, number))})

    def __getstate__(self) -> dict[str, Any]:
        """Without what Tune need not write down."""
        return {key: value for key, value in super().__getstate__().items() if key not in ("compose", "config")}


class TrialSource(SearchAlgorithm):
    """The trials of a sweep, whose ids are their numbers.

    No Searcher, since pbt refuses those, and since a trial that goes on must have the id under which the scheduler knows it.
    """

    def __init__(
        self,
        points: SearchPoints | GivenJobs,
        goal: Goal,
        journal: Journal,
        scheduler: TrialScheduler | None,
        unfinished: Collection[int],
    ) -> None:
        """unfinished: the trials of the journal that are not done. Raises UserError for a journal of other points."""
        self.points, self.goal, self.journal, self.scheduler = points, goal, journal, scheduler
        self.live: set[str] = set()
        self.max_concurrent: float = math.inf  # trials that are handed out and not complete, as the user says
        self.room: Callable[[], float] = lambda: math.inf  # and as the machines have room for
        self.compose: Callable[[Point, int], DictConfig]
        self.resources: Callable[[DictConfig], tune.PlacementGroupFactory]

        trials = {number: trial for number, trial in sorted(journal.trials.items()) if points.has(number)}
        known = {number: points.read(trial) for number, trial in trials.items()}
        points.take_up(known, {number: self._value(trials[number]) for number in trials if number not in unfinished})
        left = [number for number in trials if number in unfinished and number >= points.limit]
        if left:
            log.info(f"num_samples={points.limit}: trials from #{left[0]} on, which were begun, stay as they are")
        self.waiting: list[Point] = []  # of earlier starts
        for number in (number for number in trials if number in unfinished and number not in left):
            ended = trials[number].state in (FINISHED, PRUNED)
            last = {FINISH_AFTER: max(trials[number].rows, default=0)} if ended else {}
            self.waiting.append({JOB: number} | known[number] | last)

    def is_done(self) -> bool:
        """Whether there is nothing to run."""
        return not self.waiting and self.points.is_over()

    def add_configurations(self, experiments: Sequence[Experiment]) -> None:
        (self.experiment,) = experiments
        self._begun = {point[JOB]: self._trial(point) for point in self.waiting}
        if self.journal.trials:
            self._tell_scheduler()

    def next_trial(self) -> Trial | None:
        if self.is_finished() or len(self.live) >= min(self.max_concurrent, self.room()):
            return None
        if self.waiting:
            trial = self._begun[self.waiting.pop(0)[JOB]]
        else:
            point = self.points.suggest()
            if not isinstance(point, dict):
                if point == Searcher.FINISHED:
                    self.set_finished()
                return None
            trial = self._trial(point)
        self.live.add(trial.trial_id)
        return trial

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.points.report(int(trial_id), result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.live.discard(trial_id)
        record = self.journal.trials.get(int(trial_id))
        if record is None:
            return
        result = result or {}
        state = result.get(trainable.STATE)
        value = self.goal.worst if state == DIVERGED else self._value(record, result.get(self.goal.metric))
        self.points.complete(int(trial_id), None if error or state in (FAILED, PAUSED) else value)

    def _trial(self, point: Point) -> Trial:
        spec = self.experiment.spec
        return SweepTrial(
            point,
            self.compose,
            self.resources,
            trainable_name=spec["run"],
            storage=spec["storage"],
            checkpoint_config=spec["checkpoint_config"],
            max_failures=spec["max_failures"],
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
                ended = sum(trial.state in OVER for trial in self.journal.trials.values())
                log.warning(
                    f"{type(self.scheduler).__name__} begins anew: it compares new trials, and those that go on, with each "
                    f"other, and not with the {ended} that have ended"
                )
            return
        controller: Any = SimpleNamespace(get_live_trials=list)  # Tune's: nothing runs, nothing is paused
        trials = {number: Trial("", stub=True, trial_id=str(number)) for number in self.journal.trials} | self._begun
        for trial in trials.values():
            self.scheduler.on_trial_add(controller, trial)
        last = {number: max(trial.rows, default=0) for number, trial in self.journal.trials.items()}
        ended = set()
        for number, epoch in self.journal.order:
            over = number not in self._begun
            if number in ended or not (epoch or (over and last[number])):
                continue
            trial, row = trials[number], dict(self.journal.trials[number].rows[epoch or last[number]])
            row[self.goal.metric] = self.goal.finite(row.get(self.goal.metric))
            # median also takes the rows of a trial that is over this way, without the slow decision about each.
            if epoch == 0 or (over and isinstance(self.scheduler, MedianStoppingRule)):
                self.scheduler.on_trial_complete(controller, trial, row)
                if epoch == 0:
                    ended.add(number)
            elif self.scheduler.on_trial_result(controller, trial, row) == TrialScheduler.STOP and not over:
                ended.add(number)
                if epoch == last[number]:
                    trial.config.setdefault(FINISH_AFTER, epoch)
