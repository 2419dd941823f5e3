"""hydra.sweeper.search: from its name to the search, a Searcher of Ray Tune, which suggests the points that are tried.

suggest(trial_id) answers with a point, with None (ask again later) or with FINISHED; on_trial_complete tells the search the
result of a trial that it suggested, add_evaluated_point of any other. No search is ever saved: the journal has everything.
What is drawn at random is a pure function of the seed and of numbers.
"""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from src.engine.runs import seeding
from src.engine.runs.errors import UserError
from src.engine.sweeps.commands import sweep_command
from src.engine.sweeps.goal import Goal
from src.engine.sweeps.ray_classes import call, class_of, refused, unknown
from src.engine.sweeps.space import Parameter, Space

Point = dict[str, Any]

SEARCHES = ("random", "grid", "optuna", "bayesopt")


def build_search(search: Any, space: Space, goal: Goal, seed: int) -> Searcher:
    """search: a name of SEARCHES, or {_target_: ray.tune.search.PATH, ...}. Raises UserError."""
    if isinstance(search, dict):
        return _search_of_class(search, space, goal)
    if search == "random":
        return RandomSearch(space, seed)
    if search == "grid":
        return GridSearch(space)
    if search in ("optuna", "bayesopt"):
        return _optuna(search, space, goal, seed)
    raise unknown("search", search, SEARCHES)


def random_point(space: Space, *parts: int | str) -> Point:
    """A point as a function of the parts. Each parameter is drawn by itself: a new one leaves the others as they were."""

    def draw(parameter: Parameter) -> Any:
        state = np.random.RandomState(seeding.key(*parts, parameter.name) % 2**32)
        return parameter.domain.sample(random_state=state)

    return {name: draw(parameter) for name, parameter in space.parameters.items()}


class NumberedSearch(Searcher):
    """A search whose points follow from their numbers, counted from 0. It learns nothing."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space, self.number = space, 0

    def point(self, number: int) -> Point | None:
        """None: there are no more."""
        raise NotImplementedError

    def suggest(self, trial_id: str) -> Point | str:
        self.number += 1
        return self.point(self.number - 1) or Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None: ...

    def add_evaluated_point(self, *_: Any, **__: Any) -> None: ...


class RandomSearch(NumberedSearch):
    """search=random."""

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space)
        self.seed = seed

    def point(self, number: int) -> Point:
        return random_point(self.space, self.seed, "trial", number)


class GridSearch(NumberedSearch):
    """search=grid: all combinations, the last parameter changing fastest. Raises UserError for an interval."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        for parameter in space.parameters.values():
            if parameter.values is None:
                raise UserError(
                    f"search=grid cannot list the values of {parameter.key}",
                    where=f"{parameter.key}: {parameter.describe()}",
                    why="a grid has every combination of named values, and an interval names none",
                    fix=[sweep_command("search=random"), sweep_command(f"{parameter.key}={_examples(parameter)}")],
                )

    def point(self, number: int) -> Point | None:
        combinations = itertools.product(*(parameter.values for parameter in self.space.parameters.values()))
        values = next(itertools.islice(combinations, number, None), None)
        return None if values is None else dict(zip(self.space.parameters, values, strict=True))


def _examples(parameter: Parameter) -> str:
    """Both ends of an interval, and a value between them, as they are typed."""
    low, high = parameter.ends
    middle = math.sqrt(low * high) if parameter.log else (low + high) / 2
    values = [low, round(middle) if parameter.whole else middle, high]
    return ",".join(f"{value:g}" for value in dict.fromkeys(values))


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
    """A search of Ray's or of this project, with the keys of the entry. A search of this project may take the `space`."""
    cls = class_of(entry, "search")
    offered = {"metric": goal.metric, "mode": goal.mode}
    if not cls.__module__.startswith("ray."):
        offered["space"] = space
    taken = inspect.signature(cls).parameters
    search = call(cls, {key: value for key, value in offered.items() if key in taken} | entry, "search")
    try:
        # Answers False where the entry has a space of its own, which is fine.
        search.set_search_properties(goal.metric, goal.mode, space.domains)
    except ValueError as error:
        raise refused(entry, "search", str(error)) from error
    return search
