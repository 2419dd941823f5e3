"""hydra.sweeper.search: from its name to the points that are tried, numbered from 0, the default config first, none twice.

random and grid are iterators, optuna and bayesopt are Searchers of Ray Tune. No search is ever saved: the next start of a
sweep asks it again, and what it knows comes from the journal. What is drawn at random is a pure function of the seed and of
numbers.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from src.engine.runs import seeding
from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps.jobs import JOB
from src.engine.sweeps.schedulers import call, class_of, refused, unknown
from src.engine.sweeps.settings import sweep_command
from src.engine.sweeps.space import Parameter, Space, plain
from src.engine.sweeps.sweep_journal import Goal, TrialRecord

log = logging.getLogger(__name__)

Point = dict[str, Any]

SEARCHES = ("random", "grid", "optuna", "bayesopt")
ATTEMPTS = 20  # how often a Searcher is asked for a new point before one is drawn at random


def build_search(search: Any, space: Space, goal: Goal, seed: int) -> Searcher | Iterator[Point]:
    """search: a name of SEARCHES, or {_target_: ray.tune.search.PATH, ...}. Raises UserError."""
    if isinstance(search, dict):
        return _search_of_class(search, space, goal)
    if search == "random":
        return (random_point(space, seed, "trial", number) for number in itertools.count())
    if search == "grid":
        return grid_points(space)
    if search in ("optuna", "bayesopt"):
        return _optuna(search, space, goal, seed)
    raise unknown("search", search, SEARCHES)


def random_point(space: Space, *parts: int | str) -> Point:
    """A point as a function of the parts. Each parameter is drawn by itself: a new one leaves the others as they were."""

    def draw(parameter: Parameter) -> Any:
        state = np.random.RandomState(seeding.key(*parts, parameter.name) % 2**32)
        return plain(parameter.domain.sample(random_state=state))

    return {name: draw(parameter) for name, parameter in space.parameters.items()}


def grid_points(space: Space) -> Iterator[Point]:
    """All combinations, the last parameter changing fastest. Raises UserError for an interval."""
    for parameter in space.parameters.values():
        if parameter.values is None:
            low, high = parameter.ends
            middle = math.sqrt(low * high) if parameter.log else (low + high) / 2
            values = dict.fromkeys([low, round(middle) if parameter.whole else middle, high])
            raise UserError(
                f"search=grid cannot list the values of {parameter.key}",
                where=f"{parameter.key}: {parameter.describe()}",
                why="a grid has every combination of named values, and an interval names none",
                fix=[
                    sweep_command("search=random"),
                    sweep_command(f"{parameter.key}={','.join(f'{value:g}' for value in values)}"),
                ],
            )
    combinations = itertools.product(*(parameter.values or () for parameter in space.parameters.values()))
    return (dict(zip(space.parameters, values, strict=True)) for values in combinations)


def _optuna(name: str, space: Space, goal: Goal, seed: int) -> Searcher:
    """optuna: tree-structured Parzen estimator; bayesopt: a Gaussian process, after ten random points."""
    import optuna  # a second
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its other messages are a line per trial, and advice
    warnings.filterwarnings("ignore", message="Clip non-finite values")  # `worst` below
    warnings.filterwarnings("ignore", message="GPSampler is experimental")  # before optuna 5
    sampler = {"optuna": optuna.samplers.TPESampler, "bayesopt": optuna.samplers.GPSampler}[name]
    search = OptunaSearch(
        OptunaSearch.convert_search_space(space.domains),
        goal.metric,
        goal.mode,
        sampler=sampler(seed=seeding.key(seed, name) % 2**32),
    )
    # Beside Goal's finite worst value of 1e30 all others would look alike to a Gaussian process; inf counts as the worst seen.
    search.worst = -goal.sign * math.inf
    return search


def _search_of_class(entry: dict[str, Any], space: Space, goal: Goal) -> Searcher:
    """A search of Ray's or of this project, with the keys of the entry."""
    cls = class_of(entry, "search")
    offered = {"metric": goal.metric, "mode": goal.mode}
    taken = inspect.signature(cls).parameters
    search = call(cls, {key: value for key, value in offered.items() if key in taken} | entry, "search")
    try:
        # Answers False where the entry has a space of its own, which is fine.
        search.set_search_properties(goal.metric, goal.mode, space.domains)
    except ValueError as error:
        raise refused(entry, "search", str(error)) from error
    return search


class SearchPoints:
    """The trials of a search. What the TrialSource asks for the trials of a launcher is launch.GivenJobs."""

    def __init__(
        self, search: Searcher | Iterator[Point], space: Space, goal: Goal, seed: int, default: Point | None = None
    ) -> None:
        """default: the point of trial 0, see space.default_point; None: the search is asked for it too."""
        self.search, self.space, self.goal, self.seed, self.default = search, space, goal, seed, default
        self.limit: float = math.inf  # the number of trials after which there are no more
        self.number = 0  # of the next trial
        self.open: dict[int, tuple[Point, str | None]] = {}  # trial -> its point, and its id with the search
        self.values: dict[tuple[str, ...], float | None] = {}  # the overrides of each point so far -> its value
        self.overrides, self.params = space.overrides, space.params

    def has(self, number: int) -> bool:
        """Whether a trial of the journal is among these; a launcher may have other batches."""
        return True

    def read(self, trial: TrialRecord) -> Point:
        """The point of a trial of the journal. Raises UserError where the space does not have it."""
        try:
            point = self.space.point(trial.overrides)
        except Exception:  # whatever Hydra's parser makes of a word that is no override
            point = {}
        is_default = trial.number == 0 and self.default is not None and self._key(point) == self._key(self.default)
        if not is_default and not self.space.contains(point):
            raise UserError(
                f"trial {trial.number} of the sweep is no point of its space",
                where=f"trials.jsonl: {' '.join(trial.overrides)[:300]}",
                why="\n".join(self.space.describe()[:6]),
                fix=sweep_command("name=another-sweep"),
                code=ExitCode.DATA,
            )
        return point

    def take_up(self, points: Mapping[int, Point], values: Mapping[int, float | None]) -> None:
        """points: of all trials of earlier starts; values: of those that are done, None of a failed trial."""
        self.number = max(points, default=-1) + 1
        for number, point in points.items():
            self.open[number] = point, None
            self.values[self._key(point)] = None
            if number in values:
                self.complete(number, values[number])

    def is_over(self) -> bool:
        """Whether there are no more points, whatever the search would say."""
        size, tried = self.space.size(), len(self.values)
        if self.default is not None and not self.space.contains(self.default):
            tried -= 1
        return (size is not None and tried >= size) or self.number >= self.limit

    def suggest(self) -> Point | str | None:
        """The next point, with its number as JOB; FINISHED; None: ask later."""
        if self.is_over():
            return Searcher.FINISHED
        point, search_id = self.default, None
        if self.number > 0 or self.default is None:
            point, search_id = self._new_point()
        if not isinstance(point, dict):
            return point
        self.open[self.number] = point, search_id
        self.values[self._key(point)] = None
        self.number += 1
        return {JOB: self.number - 1, **point}

    def report(self, number: int, result: dict[str, Any]) -> None:
        """A row of a trial that goes on."""
        _, search_id = self.open.get(number, (None, None))
        if search_id is not None and self.goal.metric in result:  # Optuna's fails without it
            self.search.on_trial_result(search_id, result)

    def complete(self, number: int, value: float | None) -> None:
        """value: the best of the trial; None: it failed, or did not come to its end."""
        point, search_id = self.open.pop(number, (None, None))
        if point is None:
            return
        self.values[self._key(point)] = value
        if search_id is not None:
            self._tell(search_id, value)
        elif value is not None and isinstance(self.search, Searcher) and self.space.contains(point):
            try:
                self.search.add_evaluated_point(point, self._told(value))
            except (NotImplementedError, TypeError, ValueError) as error:  # some searches of Ray's
                why = f" ({error})" if str(error) else ""
                search = type(self.search).__name__
                log.warning(f"{search} cannot be told of trial {number}, which it did not suggest{why}")

    def _new_point(self) -> tuple[Point | str | None, str | None]:
        """A point that was not tried, and the id under which the search knows it; None: it does not."""
        if not isinstance(self.search, Searcher):
            new = (point for point in self.search if self._key(point) not in self.values)
            return next(new, Searcher.FINISHED), None
        for attempt in range(ATTEMPTS):
            search_id = f"{self.number}-{attempt}"
            point = self.search.suggest(search_id)
            if not isinstance(point, Mapping):
                return point, None
            point = {name: plain(value) for name, value in point.items()}
            if self._key(point) not in self.values:
                return point, search_id
            self._tell(search_id, self.values[self._key(point)])
        draws = (random_point(self.space, self.seed, "unseen", self.number, draw) for draw in itertools.count())
        return next(point for point in draws if self._key(point) not in self.values), None

    def _tell(self, search_id: str, value: float | None) -> None:
        result = None if value is None else {self.goal.metric: self._told(value)}
        self.search.on_trial_complete(search_id, result, error=value is None)

    def _told(self, value: float) -> float:
        return getattr(self.search, "worst", value) if value == self.goal.worst else value

    def _key(self, point: Point) -> tuple[str, ...]:
        return tuple(self.space.overrides(point))
