"""The scheduler of a sweep, which stops bad trials early: from its name to an object of Ray Tune's."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from src.engine.commands.user_command import rewritten
from src.engine.runs import seeding
from src.engine.runs.errors import UserError
from src.engine.sweeps.commands import SPACE, sweep_command
from src.engine.sweeps.goal import Goal
from src.engine.sweeps.ray_classes import call, class_of, refused, unknown
from src.engine.sweeps.settings import SweepSettings
from src.engine.sweeps.space import Space

SCHEDULERS = ("none", "asha", "median", "hyperband", "pbt")
# Settings that pbt may change during training; all others change the network or the data set.
MUTABLE = ("model.dropout", "model.label_smoothing", "data.augment")


def build_scheduler(settings: SweepSettings, space: Space | None, goal: Goal, max_epochs: int) -> TrialScheduler | None:
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
        raise refused(settings.scheduler, "scheduler", "its metric and mode are those of the sweep: leave them out")
    return scheduler


def changes_points(scheduler: Any) -> bool:
    """Whether the scheduler changes the points of trials under way, as pbt does."""
    if isinstance(scheduler, dict):
        return issubclass(class_of(scheduler, "scheduler"), PopulationBasedTraining)
    return scheduler == "pbt"


def keeps_checkpoints(scheduler: TrialScheduler | None) -> bool:
    """Whether the scheduler pauses trials, or copies one to another, for which Tune needs their checkpoints."""
    return isinstance(scheduler, PopulationBasedTraining | HyperBandScheduler)


def check_together(search: Any, scheduler: Any) -> None:
    """Raises UserError for a search that the scheduler cannot take. Both as in the settings."""
    if changes_points(scheduler) and search != "random":
        raise UserError(
            f"search={search} does not go with scheduler={scheduler}",
            why="it draws its first trials at random and chooses all later values itself; Ray refuses any other search",
            fix=[sweep_command("search=random"), sweep_command("scheduler=asha")],
        )


def _scheduler(settings: SweepSettings, space: Space | None, max_epochs: int) -> TrialScheduler | None:
    name, grace, factor = settings.scheduler, settings.grace_epochs, settings.reduction_factor
    if isinstance(name, dict):
        return call(class_of(name, "scheduler"), name, "scheduler")
    if name == "none":
        return None
    if name not in SCHEDULERS:
        raise unknown("scheduler", name, SCHEDULERS)
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
        return ASHAScheduler(time_attr="epoch", max_t=max_epochs + 1, grace_period=grace, reduction_factor=factor)
    if name == "hyperband":
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


def _check_grace(grace: int, max_epochs: int) -> None:
    if 1 <= grace < max_epochs:
        return
    problem = " is below 1" if grace < 1 else ": no trial could ever be stopped"
    raise UserError(
        f"grace_epochs={grace}{problem}",
        where=f"grace_epochs={grace}, trainer.max_epochs={max_epochs}",
        why="a scheduler acts after grace_epochs and before the last epoch; scheduler=none runs all to their end",
        fix=[
            sweep_command("grace_epochs=1", *(["trainer.max_epochs=12"] if max_epochs < 2 else [])),
            sweep_command("scheduler=none", remove=["grace_epochs"]),
        ],
    )
