"""hydra/sweeper=ray_tune: a search over a space, of which every point that is tried is a Hydra job."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ray import tune

from src.errors import UserError
from src.reporting.sweep_journal import FAILED, Journal
from src.tuning import judging
from src.tuning.choices import build_scheduler, build_search, changes_points, check_together
from src.tuning.cluster import at_once, check_shared, connected, resources_of
from src.tuning.commands import sweep_command
from src.tuning.controller import Sweep, run_trials
from src.tuning.finishing import conclude
from src.tuning.job import compose, make_context
from src.tuning.points import Points, random_point
from src.tuning.results import failures
from src.tuning.resuming import Again, drawn_by_tune, open_sweep, trials_of
from src.tuning.settings import SweeperSettings
from src.tuning.space import Space, default_point, read_space
from src.tuning.table import SweepDisplay
from src.tuning.without_effect import warn_without_effect
from src.user_command import corrected

log = logging.getLogger(__name__)

# Settings that change what a trial asks of the machines: where one is swept, every trial's config is looked at.
OF_THE_MACHINE = ("trainer", "strategy", "experiment", "model_parallel")


def sweep(
    settings: SweeperSettings,
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    arguments: Sequence[str],
) -> float | None:
    """Runs a sweep to its end and returns the best value. Raises UserError, KeyboardInterrupt, Terminated."""
    setup_globals()
    _check_launcher(config)
    folder, loader = judging.folder_of_sweep(config), hydra_context.config_loader
    space = read_space(arguments, settings.params, loader)
    check_together(settings.search, settings.scheduler)

    # What is mistyped, or refused by the task, is said now and not by a worker in half a minute.
    default = default_point(space, compose(loader, config, space.fixed, 0, folder))
    first = default if settings.default_first else random_point(space, settings.seed, "trial", 0)
    example = compose(loader, config, space.overrides(first), 0, folder)
    judging.check_job(task_function, example)
    _check_values(
        space,
        [first, *(random_point(space, settings.seed, "check", number) for number in range(3))],
        lambda point: judging.check_job(task_function, compose(loader, config, space.overrides(point), 0, folder)),
    )
    goal = judging.goal_of(settings, example)
    epochs = judging.max_epochs_of(example)
    scheduler = build_scheduler(settings, space, epochs)
    by_tune = changes_points(settings.scheduler)
    beginning = default if settings.default_first else None
    count = _count(settings, space, beginning)
    if by_tune:
        points, search = None, drawn_by_tune(beginning, settings.max_concurrent)
    else:
        inner = build_search(settings.search, space, goal.metric, goal.mode, settings.seed)
        points = Points(inner, space, settings.seed, beginning)
        Points.limit = count if count is not None else -1
        search = trials_of(points, settings.max_concurrent)
    warn_without_effect(settings)

    if settings.dry_run:
        describe(settings, space, goal.metric, goal.mode, count, folder, example)
        return None
    identity = {
        "kind": "sweeper",
        "space": space.describe(),
        "fixed": space.fixed,
        **{"metric": goal.metric, "mode": goal.mode, "search": settings.search, "scheduler": settings.scheduler},
        **{"seed": settings.seed, "default_first": settings.default_first},
    }
    with open_sweep(folder, identity, settings.resume) as journal:
        with connected(settings.ray):
            check_shared(folder)
            shares = _shares(settings, space, count, lambda point: compose(loader, config, point, 0, folder), example)
            context = make_context(
                task_function,
                config,
                loader,
                plan=space,
                goal=goal,
                sweep_dir=folder,
                keeps_checkpoints=judging.keeps_checkpoints(scheduler),
                grace_s=settings.grace_s,
                ship_code=settings.ray.ship_code,
            )
            room = at_once(shares(first), settings.max_concurrent)
            display = SweepDisplay(journal, goal, total=count, max_epochs=epochs, concurrent=room)
            # Not where trials are paused, which then wait for others to come.
            if not judging.keeps_checkpoints(scheduler) and _all_alike(space, example):
                Again.room = staticmethod(lambda: at_once(shares(first), settings.max_concurrent))
            Again.handed_out = [] if by_tune else _points_of(journal, space)
            Again.failed = [point for point in Again.handed_out if journal.trials[point["job"]].state == FAILED]
            log.info(
                f"{'trials' if count is None else f'{count} trials'}, {room} at once, in {os.path.relpath(folder)}"
            )
            run_trials(
                Sweep(context, settings, journal, display, goal.mode, epochs),
                search=search,
                scheduler=scheduler,
                space=space.domains if by_tune else {},
                num_samples=count if by_tune and count is not None else -1,
                resources=shares,
                at_once=room,
                state="state",
            )
        results = conclude(folder, journal, goal)
        if points is not None and points.skipped:
            log.info(f"skipped   {points.skipped} points that were tried before")
        if (error := failures(journal)) is not None:
            raise error
    return results.get("best_value")


def describe(
    settings: SweeperSettings,
    space: Space,
    metric: str,
    mode: str,
    count: int | None,
    folder: Path,
    example: DictConfig,
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
        f"judged by {metric}, the {'more' if mode == 'max' else 'less'} the better",
        f"resources {share}",
        f"folder    {os.path.relpath(folder)}",
        "first trial:",
    ]
    task = OmegaConf.masked_copy(example, [key for key in example if key != "hydra"])
    lines += [f"  {line}" for line in OmegaConf.to_yaml(task, resolve=True).splitlines()]
    for line in lines:
        log.info(line)


def _check_values(space: Space, others: Sequence[dict[str, Any]], check: Callable[[dict[str, Any]], None]) -> None:
    """Every value that is named, and both ends of an interval, must do with some values of the other parameters.

    others: points to try them with. Raises what `check` raises of a value that never does.
    """
    for name, parameter in space.parameters.items():
        ends = (parameter.domain.lower, parameter.domain.upper - parameter.whole) if parameter.values is None else ()
        for value in parameter.values or ends:
            errors: list[Exception] = []
            for point in others:
                try:
                    check({**point, name: value})
                    break
                except (HydraException, OmegaConfBaseException, UserError) as error:
                    errors.append(error)
            else:
                raise errors[0]


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


def _shares(
    settings: SweeperSettings,
    space: Space,
    count: int | None,
    composed: Callable[[list[str]], DictConfig],
    example: DictConfig,
) -> Callable[[dict[str, Any]], tune.PlacementGroupFactory]:
    """What a trial gets, as a function of its point."""
    if _all_alike(space, example):
        same = resources_of(example, settings, count)
        return lambda point: same
    return lambda point: resources_of(composed(space.overrides(point)), settings, count)


def _points_of(journal: Journal, space: Space) -> list[dict[str, Any]]:
    """The points of all trials so far, in order."""
    return [{"job": number, **space.point(trial.overrides)} for number, trial in sorted(journal.trials.items())]
