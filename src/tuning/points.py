"""Which points of the space are tried: the searches of this project, and `Points`, which numbers what any search suggests.

src/tuning/choices.py builds a search, and the sweep's TrialSource asks `Points` for what the search suggests. Searches are
Tune's Searchers: suggest(trial_id) answers with a point, with None (ask again later) or with FINISHED; on_trial_complete
tells what came of it, add_evaluated_point what an earlier start of the sweep found. None is ever saved: the sweep's journal
has all. What is drawn at random is a pure function of the seed and of numbers.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from src import seeding
from src.errors import ExitCode, UserError
from src.reporting.goal import Goal
from src.reporting.sweep_journal import TrialRecord
from src.tuning.commands import sweep_command
from src.tuning.space import Parameter, Space, plain

log = logging.getLogger(__name__)

Point = dict[str, Any]


def random_point(space: Space, *parts: int | str) -> Point:
    """A point as a function of the parts. Each parameter is drawn by itself: a new one leaves the others as they were."""

    def draw(parameter: Parameter) -> Any:
        state = np.random.RandomState(seeding.key(*parts, parameter.name) % 2**32)
        return parameter.domain.sample(random_state=state)

    return {name: draw(parameter) for name, parameter in space.parameters.items()}


class NumberedPoints(Searcher):
    """A search whose points follow from their number alone."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space, self.number = space, 0

    def point(self, number: int) -> Point | None:
        """The point of that number, counted from 0; None where there are no more."""
        raise NotImplementedError

    def suggest(self, trial_id: str) -> Point | str:
        point = self.point(self.number)
        self.number += 1
        return Searcher.FINISHED if point is None else point

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing is learnt."""

    def add_evaluated_point(self, *_: Any, **__: Any) -> None:
        """Nor here."""


class RandomPoints(NumberedPoints):
    """search=random."""

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space)
        self.seed = seed

    def point(self, number: int) -> Point:
        return random_point(self.space, self.seed, "trial", number)


class GridPoints(NumberedPoints):
    """search=grid: all combinations, the last parameter changing fastest. Raises UserError for an interval."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        for parameter in space.parameters.values():
            if parameter.values is None:
                raise UserError(
                    f"search=grid cannot list the values of {parameter.key}",
                    where=f"{parameter.key}: {parameter.describe()}",
                    why="a grid has every combination of values that are named, and an interval names none",
                    fix=[sweep_command("search=random"), sweep_command(f"{parameter.key}={_listed(parameter)}")],
                )

    def point(self, number: int) -> Point | None:
        combinations = itertools.product(*(parameter.values for parameter in self.space.parameters.values()))
        values = next(itertools.islice(combinations, number, None), None)
        return None if values is None else dict(zip(self.space.parameters, values, strict=True))


def _listed(parameter: Parameter) -> str:
    """Both ends of an interval, and a value between them, as they are typed."""
    low, high = parameter.domain.lower, parameter.domain.upper - parameter.whole
    middle = math.sqrt(low * high) if parameter.log else (low + high) / 2
    values = [low, round(middle) if parameter.whole else middle, high]
    return ",".join(f"{value:g}" for value in dict.fromkeys(values))


class BayesianPoints(Searcher):
    """search=bayesopt: a Gaussian process over intervals, by the package bayesian-optimization (version 3).

    Not Ray's BayesOptSearch: that one needs a version before 2, searches a logarithmic interval as if it were not, and
    waits for ever when one of its first trials fails. Every interval is searched as 0 to 1, so that none of them looks
    flat beside the others, and points that are still computed count as bad ones, so that they are not tried again.
    """

    FIRST = 10  # points drawn at random before the process is asked

    def __init__(self, space: Space, goal: Goal, seed: int) -> None:
        """space: of intervals only."""
        super().__init__(goal.metric, goal.mode)
        from bayes_opt import BayesianOptimization, acquisition  # with scikit-learn and scipy: a second or two

        self.space, self.goal, self.seed, self.number = space, goal, seed, 0
        self.asked: dict[str, dict[str, float]] = {}  # trial -> its point, as 0 to 1
        self.optimizer = BayesianOptimization(
            f=None,
            pbounds=dict.fromkeys(space.parameters, (0.0, 1.0)),
            acquisition_function=acquisition.ConstantLiar(acquisition.UpperConfidenceBound(kappa=2.576), "min"),
            random_state=seeding.key(seed, "bayesopt") % 2**32,
            verbose=0,
            allow_duplicate_points=True,
        )

    def suggest(self, trial_id: str) -> Point:
        if self.number < self.FIRST:
            places = self._places(random_point(self.space, self.seed, "bayesopt", self.number))
        else:
            places = self.optimizer.suggest()
        self.number += 1
        self.asked[trial_id] = places
        return {name: _value(parameter, float(places[name])) for name, parameter in self.space.parameters.items()}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        places = self.asked.pop(trial_id)
        if not error:
            self._register(places, result[self.metric])

    def add_evaluated_point(self, parameters: Point, value: float, *_: Any, **__: Any) -> None:
        self.number += 1
        self._register(self._places(parameters), value)

    def _register(self, places: dict[str, float], value: float) -> None:
        """A trial of which nothing finite is known is as bad as the worst of the others: 1e30 would flatten those."""
        target = self.goal.sign * value
        if value == self.goal.worst:
            target = min((known["target"] for known in self.optimizer.res), default=None)
        if target is not None:
            self.optimizer.register(places, target)

    def _places(self, point: Point) -> dict[str, float]:
        return {name: _place(parameter, point[name]) for name, parameter in self.space.parameters.items()}


def _value(parameter: Parameter, place: float) -> float | int:
    """What an interval has at a place from 0 to 1."""
    low, high = parameter.domain.lower, parameter.domain.upper
    value = low * (high / low) ** place if parameter.log else low + (high - low) * place
    return min(int(value), high - 1) if parameter.whole else min(max(value, low), high)


def _place(parameter: Parameter, value: float) -> float:
    """Where in its interval a value is, from 0 to 1; a whole number stands for all up to the next."""
    low, high = parameter.domain.lower, parameter.domain.upper
    value += 0.5 * parameter.whole
    return math.log(value / low) / math.log(high / low) if parameter.log else (value - low) / (high - low)


class Points:
    """What a search suggests, numbered from 0: the default config as the first, and no point twice."""

    TRIES = 20  # how often a search is asked before a point is drawn at random

    def __init__(self, search: Searcher, space: Space, goal: Goal, seed: int, default: Point | None = None) -> None:
        """default: the point of trial 0, see src.tuning.space.default_point; None: the search is asked for it too."""
        self.search, self.space, self.goal, self.seed, self.default = search, space, goal, seed, default
        self.limit: int | None = None  # the number of trials after which there are no more
        self.number = 0  # of the next trial
        self.asked: dict[int, tuple[Point, str | None]] = {}  # trial -> its point, and its id with the search
        self.values: dict[tuple[str, ...], float | None] = {}  # overrides of every point so far -> what came of it
        search.set_search_properties(goal.metric, goal.mode, space.domains)

    def read(self, trial: TrialRecord) -> Point:
        """The point of a trial of the journal. Raises UserError where the space does not have it."""
        try:
            point = self.space.point(trial.overrides)
        except Exception as error:  # whatever Hydra's parser makes of what is no override
            raise self._foreign(trial) from error
        first = trial.number == 0 and self.default is not None and self._key(point) == self._key(self.default)
        if not first and not self.space.contains(point):
            raise self._foreign(trial)
        return point

    def take_up(self, points: Mapping[int, Point], values: Mapping[int, float | None]) -> None:
        """What earlier starts of the sweep tried (trial -> point), and the values of those that are done."""
        self.number = max(points, default=-1) + 1
        if isinstance(self.search, RandomPoints):
            self.search.number = max(0, self.number - (self.default is not None))
        for number, point in points.items():
            point = {name: value for name, value in point.items() if name in self.space.parameters}
            self.asked[number] = point, None
            self.values[self._key(point)] = None
            if number in values:
                self.complete(number, values[number])

    def is_over(self) -> bool:
        """Whether there are no more points, whatever the search would say."""
        size, outside = self.space.size(), self.default is not None and not self.space.contains(self.default)
        all_tried = size is not None and len(self.values) - outside >= size
        return all_tried or (self.limit is not None and self.number >= self.limit)

    def suggest(self) -> Point | str | None:
        if self.is_over():
            return Searcher.FINISHED
        point, asked = (self.default, None) if self.number == 0 and self.default is not None else self._new_point()
        if not isinstance(point, dict):  # FINISHED, or None: later
            return point
        self.asked[self.number] = point, asked
        self.values[self._key(point)] = None
        self.number += 1
        return {"job": self.number - 1, **point}

    def report(self, number: int, result: dict[str, Any]) -> None:
        """A row of a trial that goes on."""
        _, asked = self.asked.get(number, (None, None))
        if asked is not None and self.goal.metric in result:  # Optuna's fails without it
            self.search.on_trial_result(asked, result)

    def complete(self, number: int, value: float | None) -> None:
        """What came of a trial; None: it failed, or did not come to its end."""
        point, asked = self.asked.pop(number, (None, None))
        if point is None:
            return
        self.values[self._key(point)] = value
        if asked is not None:
            self.search.on_trial_complete(asked, self._result(value), error=value is None)
        elif value is not None and self.space.contains(point):
            try:
                self.search.add_evaluated_point(point, value)
            except (NotImplementedError, TypeError, ValueError) as error:  # some searches of Ray's
                why = f" ({error})" if str(error) else ""
                log.warning(
                    f"{type(self.search).__name__} cannot be told of trial {number}, which it did not suggest{why}"
                )

    def _new_point(self) -> tuple[Point | str | None, str | None]:
        """A point that was not tried, and the id under which the search knows it; None: it does not."""
        for attempt in itertools.count() if isinstance(self.search, GridPoints) else range(self.TRIES):
            asked = f"{self.number}-{attempt}"
            point = self.search.suggest(asked)
            if not isinstance(point, Mapping):
                return point, None
            point = {name: plain(value) for name, value in point.items()}
            if self._key(point) not in self.values:
                return point, asked
            known = self.values[self._key(point)]
            self.search.on_trial_complete(asked, self._result(known), error=known is None)
        draws = (random_point(self.space, self.seed, "unseen", self.number, draw) for draw in itertools.count())
        return next(point for point in draws if self._key(point) not in self.values), None

    def _result(self, value: float | None) -> dict[str, Any] | None:
        return None if value is None else {self.goal.metric: value}

    def _key(self, point: Point) -> tuple[str, ...]:
        return tuple(self.space.overrides(point))

    def _foreign(self, trial: TrialRecord) -> UserError:
        return UserError(
            f"trial {trial.number} of the sweep is no point of its space",
            where=f"trials.jsonl: {' '.join(trial.overrides)[:300]}",
            why="\n".join(self.space.describe()[:6]),
            fix=sweep_command("name=another-sweep"),
            code=ExitCode.DATA,
        )
