"""run_sweep: the one way in which a sweep runs, whether its trials are jobs (launch.py) or points of a search (sweep.py)."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import version
from omegaconf import DictConfig
from ray.tune.schedulers import TrialScheduler

from src.engine.commands.user_command import shell_command
from src.engine.sweeps.cluster import at_once, check_shared, connect, request_of, resources_of
from src.engine.sweeps.controller import Sweep, fill_in, run_trials
from src.engine.sweeps.folder import is_done, open_sweep, scratch_folder
from src.engine.sweeps.goal import Goal
from src.engine.sweeps.jobs import HydraSweep, max_epochs_of
from src.engine.sweeps.progress import SweepDisplay
from src.engine.sweeps.results import conclude
from src.engine.sweeps.schedulers import changes_points, keeps_checkpoints
from src.engine.sweeps.settings import SweepSettings
from src.engine.sweeps.source import TrialSource
from src.engine.sweeps.sweep_journal import Journal
from src.engine.sweeps.worker import Context, name_of

if TYPE_CHECKING:
    from src.engine.sweeps.launch import GivenJobs
    from src.engine.sweeps.search_points import SearchPoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, before anything of it is written or run."""

    goal: Goal
    points: SearchPoints | GivenJobs
    scheduler: TrialScheduler | None
    identity: dict[str, Any]  # what makes two sweeps the same
    configs: list[DictConfig]  # of its jobs; of a search, those that were composed to check the space
    total: int | None  # trials; None: until the time is over
    first: int = 0  # the number of the first trial; a launcher may have had other batches before


def run_sweep(plan: SweepPlan, settings: SweepSettings, hydra: HydraSweep) -> Journal:
    """Runs a sweep to its end, from its start or from where it was, with today's settings.

    Raises UserError; KeyboardInterrupt and Terminated after the trials have saved their positions.
    """
    folder, goal, keeps = hydra.folder, plan.goal, keeps_checkpoints(plan.scheduler)
    with open_sweep(folder, plan.identity, settings.resume) as journal:
        unfinished = [number for number, trial in journal.trials.items() if not is_done(folder, trial, keeps)]
        for number in unfinished:
            fill_in(journal, journal.trials[number], goal.metric)
        source = TrialSource(plan.points, goal, journal, plan.scheduler, unfinished)
        if source.is_done():
            log.info(f"{os.path.relpath(folder)} is finished: there is nothing left to run")
        else:
            connect(settings.ray)
            with scratch_folder(folder) as scratch:
                check_shared(folder)
                _run(plan, settings, hydra, source, scratch)
        conclude(journal, goal)
        return journal


def _run(plan: SweepPlan, settings: SweepSettings, hydra: HydraSweep, source: TrialSource, scratch: Path) -> None:
    """scratch: a folder for Tune's own files."""
    limit, keeps = settings.max_concurrent, keeps_checkpoints(plan.scheduler)
    count = None if plan.total is None else plan.total - plan.first
    requests = {request_of(config, settings) for config in plan.configs}
    resources = [resources_of(request, limit, count) for request in requests]
    room = max(at_once(share, limit) for share in resources)
    source.compose = lambda point, number: hydra.compose(plan.points.overrides(point), number)
    source.resources = lambda config: resources_of(request_of(config, settings), limit, count)
    if limit is not None:
        source.max_concurrent = limit
    if len(requests) == 1 and not keeps:  # paused trials wait for others to come
        # Keep one suggestion queued beyond the current capacity, so that a joining machine starts at once; no more, because
        # later suggestions should use finished results.
        source.room = lambda: at_once(resources[0], None) + 1
    context = Context(
        task=name_of(hydra.task),
        hydra=hydra.context,
        version_base=str(version.getbase()),
        goal=plan.goal,
        sweep_dir=hydra.folder,
        scratch=scratch,
        keeps_checkpoints=keeps,
        changes_points=changes_points(settings.scheduler),
        grace_s=settings.grace_s,
        cwd=None if settings.ray.ship_code else Path.cwd(),
        command=shell_command(),
    )
    epochs = max(map(max_epochs_of, plan.configs))
    display = SweepDisplay(source.journal, plan.goal, total=plan.total, max_epochs=epochs, concurrent=room)
    many = {None: "trials", 1: "1 trial"}.get(plan.total, f"{plan.total} trials")
    log.info(f"{many}, {room} at once, in {os.path.relpath(hydra.folder)}")
    run_trials(Sweep(context, settings, display, source, epochs, room), plan.scheduler)
