"""hydra/sweeper=ray_tune: a search over a space, of which every point that is tried is a Hydra job."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.errors import UserError
from src.reporting.goal import Goal
from src.reporting.sweep_journal import ranking
from src.tuning import judging
from src.tuning.choices import build_scheduler, build_search, check_together
from src.tuning.cluster import resources_of
from src.tuning.commands import sweep_command
from src.tuning.job import HydraJob, compose
from src.tuning.pipeline import SweepPlan, run_sweep
from src.tuning.points import Points, random_point
from src.tuning.results import failures
from src.tuning.settings import SweeperSettings
from src.tuning.source import TrialSource
from src.tuning.space import Parameter, Space, default_point, read_space
from src.tuning.without_effect import warn_without_effect
from src.user_command import corrected

log = logging.getLogger(__name__)

# Settings that change what a trial asks of the machines: where one is swept, every trial's config is looked at.
OF_THE_MACHINE = ("trainer", "strategy", "experiment", "model_parallel")


def sweep(settings: SweeperSettings, hydra: HydraJob, arguments: Sequence[str]) -> float | None:
    """Runs a sweep to its end and returns the best value. Raises UserError, KeyboardInterrupt, Terminated."""
    setup_globals()
    _check_launcher(hydra.config)
    folder = judging.folder_of_sweep(hydra.config)
    space = read_space(arguments, settings.params, hydra.context.config_loader)
    check_together(settings.search, settings.scheduler)

    def composed(words: Sequence[str]) -> DictConfig:
        return compose(hydra.context.config_loader, hydra.config, words, 0, folder)

    # What is mistyped, or refused by the task, is said now and not by a worker in half a minute.
    shared = composed(space.fixed)
    default = default_point(space, shared)
    first = default if settings.default_first else random_point(space, settings.seed, "trial", 0)
    example = composed(space.overrides(first))
    others = [first, *(random_point(space, settings.seed, "check", number) for number in range(3))]
    epochs = max(judging.max_epochs_of(one) for one in _checked(space, others, hydra.task, composed))
    goal = judging.goal_of(settings, example)
    scheduler = build_scheduler(settings, space, goal, epochs)
    points = Points(
        build_search(settings.search, space, goal, settings.seed),
        space, goal, settings.seed, default if settings.default_first else None,
    )  # fmt: skip
    points.limit = count = _count(settings, space, points.default)
    warn_without_effect(settings)
    if settings.dry_run:
        describe(settings, space, goal, count, folder, example)
        return None
    alike = _all_alike(space, example)
    plan = SweepPlan(
        folder,
        goal,
        TrialSource(space, goal, points),
        scheduler,
        epochs,
        identity={
            **{"kind": "sweeper", "search": settings.search, "scheduler": settings.scheduler, "seed": settings.seed},
            **{"metric": goal.metric, "mode": goal.mode, "default_first": settings.default_first},
            "default": space.params(default) if settings.default_first else None,
            "space": {one.key: _values(one) for one in space.parameters.values()},
            "config": judging.settings_of(shared, [one.key.lstrip("+") for one in space.parameters.values()]),
        },
        shares=lambda point: resources_of(example if alike else composed(space.overrides(point)), settings, count),
        total=count,
        example=first,
        alike=alike,
    )
    journal = run_sweep(plan, settings, hydra)
    if (error := failures(journal)) is not None:
        raise error
    ranked = ranking(journal.trials, goal)
    return ranked[0].best(goal)[0] if ranked else None


def describe(
    settings: SweeperSettings, space: Space, goal: Goal, count: int | None, folder: Path, example: DictConfig
) -> None:
    """dry_run=true: what would be done. example: the config of the first trial."""
    wanted = settings.resources
    share = f"cpu {wanted.cpu or 'by the number of trials at once'}, gpu {wanted.gpu or 'by trainer.devices'}"
    budget = f", at most {settings.time_budget_s:g} s" if settings.time_budget_s else ""
    lines = ["space", *(f"  {line}" for line in space.describe())]
    lines += [
        f"points    {space.size() or 'infinitely many'}",
        f"trials    {'until the time is over' if count is None else count}{budget}",
        f"search    {settings.search}, seed {settings.seed}",
        f"scheduler {settings.scheduler}",
        f"judged by {goal.metric}, the {'more' if goal.mode == 'max' else 'less'} the better",
        f"resources {share}",
        f"folder    {os.path.relpath(folder)}",
        "first trial:",
    ]
    task = OmegaConf.masked_copy(example, [key for key in example if key != "hydra"])
    lines += [f"  {line}" for line in OmegaConf.to_yaml(task, resolve=True).splitlines()]
    for line in lines:
        log.info(line)


def _checked(
    space: Space, others: Sequence[dict[str, Any]], task: TaskFunction, composed: Callable[[Sequence[str]], DictConfig]
) -> list[DictConfig]:
    """The config of the first of `others` with every value that is named, and both ends of every interval.

    A value must do with some of the others, which are points to try it with. Raises what refuses a value that never does.
    """
    configs = [composed(space.overrides(others[0]))]
    judging.check_job(task, configs[0])
    for name, parameter in space.parameters.items():
        ends = (parameter.domain.lower, parameter.domain.upper - parameter.whole) if parameter.values is None else ()
        for value in parameter.values or ends:
            errors: list[Exception] = []
            for point in others:
                try:
                    config = composed(space.overrides({**point, name: value}))
                    judging.check_job(task, config)
                    configs.append(config)
                    break
                except (HydraException, OmegaConfBaseException, UserError) as error:
                    errors.append(error)
            else:
                raise errors[0]
    return configs


def _values(parameter: Parameter) -> list[str] | str:
    """A list of values may grow from one start to the next, an interval has to stay."""
    if parameter.values is None:
        return parameter.describe()
    return [parameter.override(value).partition("=")[2] for value in parameter.values]


def _check_launcher(config: DictConfig) -> None:
    launcher = config.hydra.runtime.choices["hydra/launcher"]
    if launcher != "basic":
        raise UserError(
            f"hydra/launcher={launcher} has no effect with hydra/sweeper=ray_tune",
            why="the sweeper starts its trials itself, with the settings of hydra.sweeper",
            fix=corrected(remove=["hydra/launcher"]),
        )


def _count(settings: SweeperSettings, space: Space, beginning: dict[str, Any] | None) -> int | None:
    """How many trials there will be; None: until the time is over. beginning: the point of trial 0, if it is given."""
    size = space.size()
    if size is not None and beginning is not None and not space.contains(beginning):
        size += 1
    if settings.search == "grid":
        return size
    if settings.num_samples == -1:
        if size is None and settings.time_budget_s is None:
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
    return settings.num_samples if size is None else min(size, settings.num_samples)


def _all_alike(space: Space, example: DictConfig) -> bool:
    """Whether all trials ask for the same of the machines."""
    wanted = example.hydra.sweeper.resources
    return not (
        any(OmegaConf.is_interpolation(wanted, name) for name in wanted)
        or any(one.key.partition(".")[0].lstrip("+") in OF_THE_MACHINE for one in space.parameters.values())
    )
