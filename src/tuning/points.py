"""Which points of the space are tried: the searches of this project, and `Points`, which numbers what any search suggests.

src/tuning/choices.py builds a search, the sweep wraps it in `Points` and gives that to Ray Tune. All of them are Tune's
Searchers: suggest(trial_id) answers with a point, with None (ask again later) or with FINISHED; on_trial_complete tells
what came of it. What is drawn at random is a pure function of the seed and of numbers.
"""

from __future__ import annotations

import itertools
import math
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ray.tune.search import Searcher

from src import seeding
from src.errors import UserError
from src.tuning.commands import sweep_command
from src.tuning.resuming import NumberedSearch
from src.tuning.space import Parameter, Space, plain

Point = dict[str, Any]


def random_point(space: Space, *parts: int | str) -> Point:
    """A point as a function of the parts. Each parameter is drawn by itself: a new one leaves the others as they were."""

    def draw(parameter: Parameter) -> Any:
        state = np.random.RandomState(seeding.key(*parts, parameter.name) % 2**32)
        return parameter.domain.sample(random_state=state)

    return {name: draw(parameter) for name, parameter in space.parameters.items()}


class NumberedPoints(Searcher):
    """A search whose points follow from their number alone, so that the number is all there is to save."""

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

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(str(self.number), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        self.number = int(Path(checkpoint_path).read_text(encoding="utf-8"))


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

    def __init__(self, space: Space, metric: str, mode: str, seed: int) -> None:
        """space: of intervals only."""
        super().__init__(metric, mode)
        from bayes_opt import BayesianOptimization, acquisition  # with scikit-learn and scipy: a second or two

        self.space, self.seed, self.number = space, seed, 0
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
        self._register(self._places(parameters), value)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps((self.number, self.asked, self.optimizer)))

    def restore(self, checkpoint_path: str) -> None:
        self.number, self.asked, self.optimizer = pickle.loads(Path(checkpoint_path).read_bytes())

    def _register(self, places: dict[str, float], value: float) -> None:
        self.optimizer.register(places, value if self.mode == "max" else -value)

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


class Points(NumberedSearch):
    """Any search, with the trials numbered from 0, the default config as the first, and no point tried twice.

    suggest() answers {"job": number, **point}. `skipped` counts the suggestions that were tried before.
    """

    # The number of trials after which there are no more; -1: no limit. Tune pickles this object with the sweep, and a
    # sweep that is resumed may be given more trials: the driver sets it on the class, which is not pickled.
    limit: ClassVar[int] = -1
    TRIES: ClassVar[int] = 20  # how often the search is asked before a point is drawn at random

    # Tune would take an attribute named `searcher` for one of its own wrappers, and save what is in it instead of this.
    def __init__(self, inner: Searcher, space: Space, seed: int, default: Point | None = None) -> None:
        """default: the point of trial 0, see src.tuning.space.default_point; None: the search is asked for it too."""
        super().__init__()
        self.inner, self.space, self.seed, self.default = inner, space, seed, default
        self.number = self.skipped = 0
        self.running: dict[str, tuple[Point, str | None]] = {}  # trial -> its point, and its id with the inner search
        self.results: dict[tuple[str, ...], dict | None] = {}  # overrides of every point so far -> what came of it

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """config: what all trials have; the space is ours."""
        self._metric, self._mode = metric, mode
        self.inner.set_search_properties(metric, mode, self.space.domains, **spec)
        return True

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        return self.inner.set_max_concurrency(max_concurrent)

    def suggest(self, trial_id: str) -> Point | str | None:
        if 0 <= self.limit <= self.number or self._all_tried():
            return Searcher.FINISHED
        if self.number == 0 and self.default is not None:
            point, inner_id = self.default, None
        else:
            point, inner_id = self._new_point(trial_id)
        if not isinstance(point, dict):  # FINISHED, or None: later
            return point
        self.running[trial_id] = point, inner_id
        self.results[self._key(point)] = None
        self.number += 1
        return {"job": self.number - 1, **point}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        _, inner_id = self.running.get(trial_id, (None, None))
        if inner_id is not None and self._is_known(result):  # Optuna's fails without the metric
            self.inner.on_trial_result(inner_id, result)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id not in self.running:
            return  # a failed trial that a resumed sweep runs again; the search was told that it failed
        point, inner_id = self.running.pop(trial_id)
        known = result if not error and self._is_known(result) else None
        self.results[self._key(point)] = known
        if inner_id is not None:
            self.inner.on_trial_complete(inner_id, known, error=known is None)
        elif known is not None and self.space.contains(point):
            with suppress(NotImplementedError):  # not every search takes what it did not suggest
                self.inner.add_evaluated_point(point, known[self.metric])

    def catch_up(self, handed_out: Sequence[Point]) -> list[Point]:
        lost = [point for point in handed_out if point["job"] >= self.number]
        for point in lost:
            self.results[self._key(point)] = None
            self.number = max(self.number, point["job"] + 1)
        return lost

    def save(self, checkpoint_path: str) -> None:
        """One file: Tune moves it into place, and would leave a second one behind."""
        with tempfile.TemporaryDirectory() as folder:
            self.inner.save(f"{folder}/inner")
            inner = Path(folder, "inner").read_bytes()
        state = self.number, self.skipped, self.running, self.results, inner
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        self.number, self.skipped, self.running, self.results, inner = pickle.loads(Path(checkpoint_path).read_bytes())
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "inner").write_bytes(inner)
            self.inner.restore(f"{folder}/inner")

    def _new_point(self, trial_id: str) -> tuple[Point | str | None, str | None]:
        """A point that was not tried, and the id under which the inner search knows it; None: it does not."""
        for attempt in range(self.TRIES):
            inner_id = f"{trial_id}-{attempt}"
            point = self.inner.suggest(inner_id)
            if not isinstance(point, Mapping):
                return point, None
            point = {name: plain(value) for name, value in point.items()}
            if self._key(point) not in self.results:
                return point, inner_id
            self.skipped += 1
            known = self.results[self._key(point)]
            self.inner.on_trial_complete(inner_id, known, error=known is None)
        draws = (random_point(self.space, self.seed, "unseen", self.number, draw) for draw in itertools.count())
        return next(point for point in draws if self._key(point) not in self.results), None

    def _all_tried(self) -> bool:
        size = self.space.size()
        outside = self.default is not None and not self.space.contains(self.default)
        return size is not None and len(self.results) - outside >= size

    def _key(self, point: Point) -> tuple[str, ...]:
        return tuple(self.space.overrides(point))

    def _is_known(self, result: dict | None) -> bool:
        """Whether a trial says how good it is."""
        return bool(result) and not result.get("failed") and math.isfinite(result.get(self.metric, math.nan))
