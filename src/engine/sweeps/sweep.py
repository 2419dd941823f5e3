"""hydra/sweeper=ray_tune: a search over a space, in which every point that is tried is a Hydra job."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError
from src.engine.sweeps.controller import SweepPlan, run_sweep
from src.engine.sweeps.jobs import HydraSweep, goal_of, most_epochs, shared_settings, without_hydra
from src.engine.sweeps.results import failures
from src.engine.sweeps.schedulers import build_scheduler
from src.engine.sweeps.searches import Point, SearchPoints, build_search, random_point
from src.engine.sweeps.settings import SweeperSettings, sweep_command, warn_without_effect
from src.engine.sweeps.space import Space, default_point, read_space
from src.engine.sweeps.sweep_journal import ranking

log = logging.getLogger(__name__)


def sweep(settings: SweeperSettings, hydra: HydraSweep, arguments: Sequence[str]) -> float | None:
    """Runs a sweep to its end and returns the best value. Raises UserError, KeyboardInterrupt, Terminated."""
    setup_globals()
    _check_launcher(hydra.config)
    space = read_space(arguments, settings.params, hydra.context.config_loader)
    shared = hydra.compose(space.fixed)
    default = default_point(space, shared)
    configs = _checked_configs(space, hydra, settings, default)
    goal = goal_of(settings, configs[0])
    scheduler = build_scheduler(settings, space, goal, most_epochs(configs))
    search = build_search(settings.search, space, goal, settings.seed)
    points = SearchPoints(search, space, goal, settings.seed, default if settings.default_first else None)
    points.limit = _limit(settings, space, points.default)
    plan = SweepPlan(
        goal,
        points,
        scheduler,
        identity={
            "kind": "sweeper",
            "search": settings.search,
            "seed": settings.seed,
            "default_first": settings.default_first,
            "default": space.params(default) if settings.default_first else None,
            "space": {parameter.key: parameter.identity() for parameter in space.parameters.values()},
            "config": shared_settings(shared, [parameter.key.lstrip("+") for parameter in space.parameters.values()]),
        },
        configs=configs,
        total=None if points.limit == math.inf else points.limit,
    )
    warn_without_effect(settings)
    if settings.dry_run:
        _describe(plan, settings, space, hydra)
        return None
    journal = run_sweep(plan, settings, hydra)
    if (error := failures(journal)) is not None:
        raise error
    ranked = ranking(journal.trials, goal)
    return ranked[0].best(goal)[0] if ranked else None


def _describe(plan: SweepPlan, settings: SweeperSettings, space: Space, hydra: HydraSweep) -> None:
    """dry_run=true: what would be done."""
    cpu, gpu = settings.resources.cpu, settings.resources.gpu
    budget = f", at most {settings.time_budget_s:g} s" if settings.time_budget_s else ""
    lines = ["space", *(f"  {line}" for line in space.describe())]
    lines += [
        f"points    {space.size() or 'infinitely many'}",
        f"trials    {'until the time is over' if plan.total is None else plan.total}{budget}",
        f"search    {settings.search}, seed {settings.seed}",
        f"scheduler {settings.scheduler}",
        f"judged by {plan.goal.metric}, the {'more' if plan.goal.mode == 'max' else 'less'} the better",
        f"resources cpu {cpu or 'by the number of trials at once'}, gpu {gpu or 'by trainer.devices'}",
        f"folder    {os.path.relpath(hydra.folder)}",
        "first trial:",
    ]
    first_trial = OmegaConf.to_yaml(without_hydra(plan.configs[0]), resolve=True)
    lines += [f"  {line}" for line in first_trial.splitlines()]
    for line in lines:
        log.info(line)


def _checked_configs(space: Space, hydra: HydraSweep, settings: SweeperSettings, default: Point) -> list[DictConfig]:
    """The config of the first trial with every named value, and both ends of every interval, before Ray is started.

    A value must be accepted at the first trial's point or at one of three others. Raises the first error of a value that
    never is.
    """
    first = default if settings.default_first else random_point(space, settings.seed, "trial", 0)
    others = [random_point(space, settings.seed, "check", number) for number in range(3)]

    def checked(point: Point) -> DictConfig:
        config = hydra.compose(space.overrides(point))
        hydra.check(config)
        return config

    configs = [checked(first)]
    for name, parameter in space.parameters.items():
        for value in parameter.values or parameter.ends:
            errors: list[Exception] = []
            for point in [first, *others]:
                try:
                    configs.append(checked({**point, name: value}))
                    break
                except (HydraException, OmegaConfBaseException, UserError) as error:
                    errors.append(error)
            else:
                raise errors[0]
    return configs


def _check_launcher(config: DictConfig) -> None:
    launcher = config.hydra.runtime.choices["hydra/launcher"]
    if launcher != "basic":
        raise UserError(
            f"hydra/launcher={launcher} has no effect with hydra/sweeper=ray_tune",
            why="the sweeper starts its trials itself, with the settings of hydra.sweeper",
            fix=corrected(remove=["hydra/launcher"]),
        )


def _limit(settings: SweeperSettings, space: Space, default: Point | None) -> float:
    """How many trials there will be; inf: until the time is over. default: the point of trial 0, if it is given."""
    size: float = space.size() or math.inf
    if default is not None and not space.contains(default):
        size += 1
    if settings.search == "grid":
        return size
    if settings.num_samples == -1:
        if size == math.inf and settings.time_budget_s is None:
            raise UserError(
                "num_samples=-1 needs an end",
                why="the space has infinitely many points, so the sweep would never end",
                fix=[sweep_command("time_budget_s=3600"), sweep_command("num_samples=20")],
            )
        return size
    if settings.num_samples < 1:
        raise UserError(
            f"num_samples={settings.num_samples} is out of range",
            why="num_samples is at least 1, or -1: until the time is over, or all points were tried",
            fix=sweep_command("num_samples=20"),
        )
    return min(size, settings.num_samples)
