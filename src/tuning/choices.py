"""From names to objects: hydra.sweeper.search and the scheduler of a sweep, with what they can and cannot do together.

The sweep calls `check_together`, then `build_search` and `build_scheduler`.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

from hydra.utils import get_object
from ray.tune.schedulers import (
    ASHAScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from src import seeding
from src.errors import ExitCode, UserError
from src.reporting.goal import Goal
from src.tuning.commands import SPACE, sweep_command
from src.tuning.points import BayesianPoints, GridPoints, RandomPoints
from src.tuning.settings import SweeperSettings, Trials
from src.tuning.space import Space
from src.user_command import rewritten

SEARCHES = ("random", "grid", "optuna", "bayesopt")
SCHEDULERS = ("none", "asha", "median", "hyperband", "pbt")
# What a network in training can still take on: the others decide what is built, or which images it sees.
MUTABLE = ("model.dropout", "model.label_smoothing", "data.augment")
HOMES = {"search": ("ray.tune.search.", Searcher), "scheduler": ("ray.tune.schedulers.", TrialScheduler)}


def build_search(search: Any, space: Space, goal: Goal, seed: int) -> Searcher:
    """hydra.sweeper.search: a name of SEARCHES, or {_target_: ray.tune.search.PATH, ...}. Raises UserError."""
    if isinstance(search, dict):
        return _own_search(search, space, goal)
    if search == "random":
        return RandomPoints(space, seed)
    if search == "grid":
        return GridPoints(space)
    if search == "optuna":
        return _optuna(space, goal, seed)
    if search == "bayesopt":
        return _bayesopt(space, goal, seed)
    raise _unknown("search", search, SEARCHES)


def build_scheduler(settings: Trials, space: Space | None, goal: Goal, max_epochs: int) -> TrialScheduler | None:
    """The scheduler of a sweep; None: every trial runs to its end. Raises UserError.

    space: of the sweeper; None: the launcher's. max_epochs: of the longest trial.
    """
    if space is None and changes_points(settings.scheduler):
        raise UserError(
            "scheduler=pbt needs the sweeper",
            where="hydra.launcher.scheduler",
            why="it changes values while a trial runs, and the launcher's jobs are to be run as they are",
            fix=[
                sweep_command("scheduler=asha"),
                rewritten(["-m", "hydra/sweeper=ray_tune", "hydra.sweeper.scheduler=pbt", SPACE]),
            ],
        )
    scheduler = _scheduler(settings, space, max_epochs)
    if scheduler is not None and not scheduler.set_search_properties(goal.metric, goal.mode):
        raise _refused(settings.scheduler, "scheduler", "its metric and mode are those of the sweep: leave them out")
    return scheduler


def _scheduler(settings: Trials, space: Space | None, max_epochs: int) -> TrialScheduler | None:
    name, grace = settings.scheduler, settings.grace_epochs
    if isinstance(name, dict):
        return _call(_own_class(name, "scheduler"), name, "scheduler")
    if name == "none":
        return None
    if name not in SCHEDULERS:
        raise _unknown("scheduler", name, SCHEDULERS)
    if name != "hyperband":
        _check_grace(grace, max_epochs)
    if name in ("asha", "hyperband"):
        _check_factor(settings.reduction_factor)
    # One epoch more than there is: a trial that reaches max_t would count as stopped, not as finished.
    if name == "asha":
        factor = settings.reduction_factor
        return ASHAScheduler(time_attr="epoch", max_t=max_epochs + 1, grace_period=grace, reduction_factor=factor)
    if name == "hyperband":
        return HyperBandScheduler(time_attr="epoch", max_t=max_epochs + 1, reduction_factor=settings.reduction_factor)
    if name == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=grace, min_samples_required=3)
    return _population(settings, space)


def changes_points(scheduler: Any) -> bool:
    """Whether the scheduler changes the points of trials under way, as pbt does."""
    if isinstance(scheduler, dict):
        return issubclass(_own_class(scheduler, "scheduler"), PopulationBasedTraining)
    return scheduler == "pbt"


def check_together(search: Any, scheduler: Any) -> None:
    """Raises UserError for a search that the scheduler cannot take. Both as in the settings."""
    if changes_points(scheduler) and search != "random":
        raise UserError(
            f"search={search} does not go with scheduler={scheduler}",
            why="it draws its first trials at random and chooses all later values itself; Ray refuses any other search",
            fix=[sweep_command("search=random"), sweep_command("scheduler=asha")],
        )


def _optuna(space: Space, goal: Goal, seed: int) -> Searcher:
    import optuna  # a second
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else a line for every trial, beside our own
    sampler = optuna.samplers.TPESampler(seed=seeding.key(seed, "optuna") % 2**32)
    return OptunaSearch(OptunaSearch.convert_search_space(space.domains), goal.metric, goal.mode, sampler=sampler)


def _bayesopt(space: Space, goal: Goal, seed: int) -> Searcher:
    for parameter in space.parameters.values():
        if parameter.values is not None:
            raise UserError(
                f"search=bayesopt cannot choose among the values of {parameter.key}",
                where=f"{parameter.key}: {parameter.describe()}",
                why="it takes intervals only, where a value between two others lies between them in effect too",
                fix=sweep_command("search=optuna"),
            )
    if importlib.util.find_spec("bayes_opt") is None:
        raise UserError(
            "search=bayesopt needs the package bayesian-optimization, which is not installed",
            why="it is an extra, so that those who do not use it need not install it",
            fix=['pip install -e ".[bayesopt]"', sweep_command("search=optuna")],
            code=ExitCode.UNAVAILABLE,
        )
    return BayesianPoints(space, goal, seed)


def _population(settings: SweeperSettings, space: Space) -> TrialScheduler:
    """Population based training (Jaderberg et al., 2017): bad trials go on as changed copies of good ones."""
    wrong = [one.key for one in space.parameters.values() if not _can_change(one.key.lstrip("+"))]
    if wrong:
        raise UserError(
            f"scheduler=pbt cannot change {', '.join(wrong)}",
            where="hydra.sweeper.scheduler=pbt",
            why=f"in the middle of a run it can change numbers of the optimizer, and {', '.join(MUTABLE)}",
            fix=[sweep_command("scheduler=asha"), sweep_command(remove=wrong)],
        )
    seeding.seed_numpy_and_python(settings.seed, "pbt")  # Ray's pbt draws from the global generators alone
    intervals = {name: one for name, one in space.parameters.items() if one.values is None}
    ends = {name: (one.domain.lower, one.domain.upper - one.whole) for name, one in intervals.items()}
    return PopulationBasedTraining(
        time_attr="epoch",
        perturbation_interval=settings.grace_epochs,
        hyperparam_mutations={name: list(one.values or ()) or one.domain for name, one in space.parameters.items()},
        custom_explore_fn=functools.partial(_keep_inside, ends),
        synch=False,
    )


def _can_change(key: str) -> bool:
    return key in MUTABLE or (key.startswith("optimizer.") and key not in ("optimizer.name", "optimizer.schedule"))


def _keep_inside(ends: dict[str, tuple[float, float]], point: dict[str, Any]) -> dict[str, Any]:
    """Ray multiplies a value by 0.8 or 1.2 wherever that leads."""
    return point | {name: min(max(point[name], low), high) for name, (low, high) in ends.items()}


def _check_grace(grace: int, max_epochs: int) -> None:
    if not 1 <= grace < max_epochs:
        raise UserError(
            f"grace_epochs={grace}: no trial could ever be stopped"
            if grace >= 1
            else f"grace_epochs={grace} is below 1",
            where=f"grace_epochs={grace}, trainer.max_epochs={max_epochs}",
            why="a scheduler acts after grace_epochs and before the last epoch; scheduler=none runs all to their end",
            fix=[
                sweep_command("grace_epochs=1", *(["trainer.max_epochs=12"] if max_epochs < 2 else [])),
                sweep_command("scheduler=none", remove=["grace_epochs"]),
            ],
        )


def _check_factor(factor: float) -> None:
    if factor <= 1:
        raise UserError(
            f"reduction_factor={factor:g} stops no trial",
            why="of so many trials one goes on, so it has to be above 1",
            fix=sweep_command("reduction_factor=3"),
        )


def _own_search(entry: dict[str, Any], space: Space, goal: Goal) -> Searcher:
    """A search of Ray's or of this project, with the keys of the entry. One of ours may take the `space` as it is."""
    made = _own_class(entry, "search")
    offered = {"metric": goal.metric, "mode": goal.mode} | (
        {} if made.__module__.startswith("ray.") else {"space": space}
    )
    taken = inspect.signature(made).parameters
    search = _call(made, {key: value for key, value in offered.items() if key in taken} | entry, "search")
    try:
        search.set_search_properties(
            goal.metric, goal.mode, space.domains
        )  # False where the entry has a space of its own
    except ValueError as error:
        raise _refused(entry, "search", str(error)) from error
    return search


def _own_class(entry: dict[str, Any], setting: str) -> type:
    """{_target_: PATH, ...} of search or scheduler: the class, which is below Ray's folder for them or below src.

    Nothing else is ever called: a _target_ such as ray.tune.search.os.system would be code from a config file.
    """
    home, kind = HOMES[setting]
    target, made = entry.get("_target_"), None
    if isinstance(target, str) and target.startswith((home, "src.")):
        try:
            made = get_object(target)
        except Exception as error:
            raise _refused(entry, setting, f"it cannot be imported: {error}") from error
    if not (isinstance(made, type) and issubclass(made, kind) and made.__module__.startswith((home, "src."))):
        raise _refused(
            entry, setting, f"a {setting} is a class below {home} or src. that inherits from {kind.__name__}"
        )
    return made


def _call(made: type, entry: dict[str, Any], setting: str) -> Any:
    try:
        return made(**{key: value for key, value in entry.items() if key != "_target_"})
    except (TypeError, ValueError, AssertionError, ImportError) as error:  # Ray asserts that a package is installed
        raise _refused(entry, setting, str(error)) from error


def _refused(entry: dict[str, Any], setting: str, why: str) -> UserError:
    examples = {
        "search": "{_target_: ray.tune.search.optuna.OptunaSearch, seed: 1}",
        "scheduler": "{_target_: ray.tune.schedulers.ASHAScheduler, time_attr: epoch, max_t: 13}",
    }
    return UserError(
        f"{setting}: {entry.get('_target_')} cannot be used",
        where=f"{setting}={entry}",
        why=why,
        fix=sweep_command(f"{setting}={examples[setting]}"),
    )


def _unknown(setting: str, name: Any, known: Sequence[str]) -> UserError:
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return UserError(
        f"{setting}={name} is not a choice" + (f"; did you mean {close[0]}?" if close else ""),
        why=f"{setting} is one of: {', '.join(known)}, or {{_target_: {HOMES[setting][0]}NAME}}",
        fix=sweep_command(f"{setting}={(close or known)[0]}"),
    )
