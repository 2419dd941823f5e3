"""The scheduler of a sweep, which stops bad trials early: from its name to an object of Ray Tune's.

Also the classes that settings name: search={_target_: PATH, ...} and scheduler={_target_: PATH, ...}.
"""

from __future__ import annotations

import math
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

from src.engine.commands.knobs import ANY
from src.engine.commands.user_command import rewritten
from src.engine.runs import seeding
from src.engine.runs.errors import UserError
from src.engine.sweeps.settings import SPACE, SweeperSettings, SweepSettings, not_a_choice, sweep_command
from src.engine.sweeps.space import Space
from src.engine.sweeps.sweep_journal import Goal

SCHEDULERS = ("none", "asha", "median", "hyperband", "pbt")
# Settings that pbt may change during training; all others change the network or the data set.
MUTABLE = ("model.dropout", "model.label_smoothing", "data.augment")

HOMES = {"search": ("ray.tune.search.", Searcher), "scheduler": ("ray.tune.schedulers.", TrialScheduler)}
EXAMPLES = {
    "search": "{_target_: ray.tune.search.optuna.OptunaSearch, seed: 1}",
    "scheduler": "{_target_: ray.tune.schedulers.ASHAScheduler, time_attr: epoch, max_t: 13}",
}


def build_scheduler(
    settings: SweepSettings, space: Space | None, goal: Goal, max_epochs: int | None
) -> TrialScheduler | None:
    """The scheduler of a sweep; None: every trial runs to its end. Raises UserError, also for a search that it cannot take.

    space: of the sweeper; None: the launcher's. max_epochs: of the longest trial; None: not known.
    """
    name = settings.scheduler
    if isinstance(name, dict):
        cls = class_of(name, "scheduler")
        if issubclass(cls, PopulationBasedTraining):
            _check_pbt(settings)
        scheduler = call(cls, name, "scheduler")
    else:
        scheduler = _by_name(settings, space, max_epochs)
    if scheduler is not None and not scheduler.set_search_properties(goal.metric, goal.mode):
        raise refused(name, "scheduler", "its metric and mode are those of the sweep: leave them out")
    return scheduler


def keeps_checkpoints(scheduler: TrialScheduler | None) -> bool:
    """Whether the scheduler pauses trials, or copies one to another, for which Tune needs their checkpoints."""
    return isinstance(scheduler, PopulationBasedTraining | HyperBandScheduler)


def _by_name(settings: SweepSettings, space: Space | None, max_epochs: int | None) -> TrialScheduler | None:
    name, grace, factor = settings.scheduler, settings.grace_epochs, settings.reduction_factor
    if name == "none":
        return None
    if name not in SCHEDULERS:
        raise unknown("scheduler", name, SCHEDULERS)
    if name == "pbt":
        _check_pbt(settings)
    if name != "hyperband":
        _check_grace(grace, max_epochs)
    if name in ("asha", "hyperband") and factor <= 1:
        raise UserError(
            f"reduction_factor={factor:g} stops no trial",
            why="1 of every reduction_factor trials goes on, so it has to be above 1",
            fix=sweep_command("reduction_factor=3"),
        )
    # One epoch more than there is: a trial that reaches max_t would count as stopped, not as finished.
    if name == "asha":
        return ASHAScheduler(
            time_attr="epoch", max_t=(max_epochs or ANY) + 1, grace_period=grace, reduction_factor=factor
        )
    if name == "hyperband":
        if max_epochs is None:
            raise UserError(
                "scheduler=hyperband needs to know how many epochs a trial has",
                where="trainer.max_epochs=auto",
                why="it divides them into brackets before the first trial, and auto follows from a trial's images",
                fix=[sweep_command("trainer.max_epochs=12"), sweep_command("scheduler=asha")],
            )
        return HyperBandScheduler(time_attr="epoch", max_t=max_epochs + 1, reduction_factor=factor)
    if name == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=grace, min_samples_required=3)
    return _population(settings, space)


def _population(settings: SweepSettings, space: Space) -> TrialScheduler:
    """Population based training (Jaderberg et al., 2017): bad trials go on as changed copies of good ones."""
    keys = [parameter.key for parameter in space.parameters.values()]
    if fixed := [key for key in keys if not _can_change(key.lstrip("+"))]:
        raise UserError(
            f"scheduler=pbt cannot change {', '.join(fixed)}",
            where="hydra.sweeper.scheduler=pbt",
            why=f"in the middle of a run it can change numbers of the optimizer, and {', '.join(MUTABLE)}",
            fix=[sweep_command("scheduler=asha"), sweep_command(remove=fixed)],
        )
    seeding.seed_numpy_and_python(settings.seed, "pbt")  # Ray's pbt draws from the global generators alone
    ends = {name: parameter.ends for name, parameter in space.parameters.items() if parameter.values is None}

    def kept_inside(point: dict[str, Any]) -> dict[str, Any]:
        """Ray multiplies a value by 0.8 or 1.2 wherever that leads."""
        return point | {name: min(max(point[name], low), high) for name, (low, high) in ends.items()}

    return PopulationBasedTraining(
        time_attr="epoch",
        perturbation_interval=settings.grace_epochs,
        hyperparam_mutations={name: list(one.values or ()) or one.domain for name, one in space.parameters.items()},
        custom_explore_fn=kept_inside,
        synch=False,
    )


def _can_change(key: str) -> bool:
    return key in MUTABLE or (key.startswith("optimizer.") and key not in ("optimizer.name", "optimizer.schedule"))


def _check_pbt(settings: SweepSettings) -> None:
    if not isinstance(settings, SweeperSettings):
        raise UserError(
            "scheduler=pbt needs the sweeper",
            where="hydra.launcher.scheduler",
            why="it changes values while a trial runs, and the launcher's jobs are to be run as they are",
            fix=[
                sweep_command("scheduler=asha"),
                rewritten(["-m", "hydra/sweeper=ray_tune", "hydra.sweeper.scheduler=pbt", SPACE]),
            ],
        )
    if settings.search != "random":
        raise UserError(
            f"search={settings.search} does not go with scheduler={settings.scheduler}",
            why="it draws its first trials at random and chooses all later values itself; Ray refuses any other search",
            fix=[sweep_command("search=random"), sweep_command("scheduler=asha")],
        )


def _check_grace(grace: int, max_epochs: int | None) -> None:
    if 1 <= grace < (max_epochs or math.inf):
        return
    problem = " is below 1" if grace < 1 else ": no trial could ever be stopped"
    raise UserError(
        f"grace_epochs={grace}{problem}",
        where=f"grace_epochs={grace}, trainer.max_epochs={max_epochs or 'auto'}",
        why="a scheduler acts after grace_epochs and before the last epoch; scheduler=none runs all to their end",
        fix=[
            sweep_command("grace_epochs=1", *(["trainer.max_epochs=12"] if max_epochs == 1 else [])),
            sweep_command("scheduler=none", remove=["grace_epochs"]),
        ],
    )


def class_of(entry: dict[str, Any], setting: str) -> type:
    """The class of an entry of `search` or `scheduler`, which is below Ray's folder for them or below src. Raises UserError.

    Nothing else is ever called: a _target_ such as ray.tune.search.os.system would be code from a config file.
    """
    home, kind = HOMES[setting]
    target, cls = entry.get("_target_"), None
    if isinstance(target, str) and target.startswith((home, "src.")):
        try:
            cls = get_object(target)
        except Exception as error:
            raise refused(entry, setting, f"it cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, kind) and cls.__module__.startswith((home, "src."))):
        raise refused(entry, setting, f"a {setting} is a class below {home} or src. that inherits from {kind.__name__}")
    return cls


def call(cls: type, entry: dict[str, Any], setting: str) -> Any:
    """An object of the class, with the keys of the entry. Raises UserError."""
    try:
        return cls(**{key: value for key, value in entry.items() if key != "_target_"})
    except (TypeError, ValueError, AssertionError, ImportError) as error:  # Ray asserts that a package is installed
        raise refused(entry, setting, str(error)) from error


def refused(entry: dict[str, Any], setting: str, why: str) -> UserError:
    return UserError(
        f"{setting}: {entry.get('_target_')} cannot be used",
        where=f"{setting}={entry}",
        why=why,
        fix=sweep_command(f"{setting}={EXAMPLES[setting]}"),
    )


def unknown(setting: str, name: Any, names: Sequence[str]) -> UserError:
    return not_a_choice(setting, name, names, f", or {{_target_: {HOMES[setting][0]}NAME}}")
