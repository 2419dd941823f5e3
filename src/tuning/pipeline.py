"""run_sweep: the one way in which a sweep runs, whether its trials are jobs (launch.py) or points of a search (sweep.py)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler

from src.reporting.goal import Goal
from src.reporting.sweep_journal import Journal
from src.tuning import judging
from src.tuning.choices import changes_points
from src.tuning.cluster import at_once, check_shared, connect
from src.tuning.controller import Sweep, fill_in, run_trials
from src.tuning.job import HydraJob, is_done, make_context
from src.tuning.results import conclude
from src.tuning.resuming import open_sweep, scratch_folder
from src.tuning.settings import Trials
from src.tuning.source import TrialSource
from src.tuning.table import SweepDisplay

log = logging.getLogger(__name__)


@dataclass
class SweepPlan:
    """A sweep, before anything of it is written or run."""

    folder: Path  # absolute
    goal: Goal
    trials: TrialSource
    scheduler: TrialScheduler | None
    max_epochs: int  # of the longest trial
    identity: dict[str, Any]  # what makes two sweeps the same
    shares: Callable[[dict[str, Any]], tune.PlacementGroupFactory]  # point -> what its trial gets; Ray has to be there
    total: int | None  # trials; None: until the time is over
    example: dict[str, Any]  # a point
    alike: bool  # all trials ask for the same of the machines


def run_sweep(plan: SweepPlan, settings: Trials, hydra: HydraJob) -> Journal:
    """Runs a sweep to its end, from its start or from where it was, with today's settings.

    Raises UserError; KeyboardInterrupt and Terminated after the trials have saved their positions.
    """
    folder, goal, trials = plan.folder, plan.goal, plan.trials
    keeps = judging.keeps_checkpoints(plan.scheduler)
    with open_sweep(folder, plan.identity, settings.resume) as journal:
        begun = [number for number, trial in journal.trials.items() if not is_done(folder, trial, keeps)]
        for number in begun:
            fill_in(journal, journal.trials[number], goal.metric)
        trials.take_up(journal, plan.scheduler, begun)
        if not trials.is_done():
            connect(settings.ray)
            with scratch_folder(folder) as scratch:
                check_shared(folder)
                trials.shares = plan.shares
                shares = [plan.shares(point) for point in trials.waiting or [plan.example]]
                room = max(at_once(share, settings.max_concurrent) for share in shares)
                trials.most = settings.max_concurrent
                if plan.alike and not keeps:  # paused trials wait for others to come
                    # One more than there is room for, so that a machine that joins gets it, and no further ones: a search
                    # that learns shall know as much as can be known.
                    trials.room = lambda: at_once(shares[0], None) + 1
                context = make_context(
                    hydra,
                    ship_code=settings.ray.ship_code,
                    plan=trials.plan,
                    goal=goal,
                    sweep_dir=folder,
                    scratch=scratch,
                    keeps_checkpoints=keeps,
                    changes_points=changes_points(settings.scheduler),
                    grace_s=settings.grace_s,
                )
                display = SweepDisplay(journal, goal, total=plan.total, max_epochs=plan.max_epochs, concurrent=room)
                many = {None: "trials", 1: "1 trial"}.get(plan.total, f"{plan.total} trials")
                log.info(f"{many}, {room} at once, in {os.path.relpath(folder)}")
                run_trials(Sweep(context, settings, journal, display, trials, plan.max_epochs, room), plan.scheduler)
        else:
            log.info(f"{os.path.relpath(folder)} is finished: there is nothing left to run")
        conclude(folder, journal, goal)
        return journal
