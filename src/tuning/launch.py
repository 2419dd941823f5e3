"""hydra/launcher=ray_tune: Hydra says which jobs there are, and each becomes a trial of Ray Tune."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from ray.tune.search import Searcher

from src.errors import UserError
from src.hydra_words import unquoted
from src.reporting.sweep_journal import DIVERGED, FAILED, FINISHED, PRUNED, Journal
from src.tuning import judging
from src.tuning.choices import build_scheduler, changes_points
from src.tuning.cluster import at_once, check_shared, connected, resources_of
from src.tuning.commands import SPACE, sweep_command
from src.tuning.controller import Sweep, run_trials
from src.tuning.finishing import conclude, say_if_basic_is_faster
from src.tuning.job import compose, make_context, returned_file
from src.tuning.results import failures
from src.tuning.resuming import Again, NumberedSearch, open_sweep, trials_of
from src.tuning.settings import LauncherSettings
from src.tuning.table import SweepDisplay
from src.tuning.without_effect import warn_without_effect
from src.user_command import named, rewritten

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Jobs:
    """The plan of a sweep whose jobs are given: number -> its overrides."""

    jobs: dict[int, list[str]]

    def overrides(self, point: Mapping[str, Any]) -> list[str]:
        return self.jobs[point["job"]]

    def params(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """What the jobs do not have in common. A value is a number where it reads as one."""
        words = [dict(word.partition("=")[::2] for word in job) for job in self.jobs.values()]
        common = {key for key in words[0] if all(job.get(key) == words[0][key] for job in words)}
        own = dict(word.partition("=")[::2] for word in self.overrides(point))
        return {key.lstrip("+"): _typed(value) for key, value in own.items() if key not in common}


def _typed(value: str) -> Any:
    value = unquoted(value)
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


class GivenJobs(NumberedSearch):
    """Hands out the jobs in their order."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        self.numbers = list(numbers)  # of those that are still to come

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        return {"job": self.numbers.pop(0)} if self.numbers else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing is learnt."""

    def catch_up(self, handed_out: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        lost = [point for point in handed_out if point["job"] in self.numbers]
        self.numbers = [number for number in self.numbers if {"job": number} not in lost]
        return lost

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps(self.numbers), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        self.numbers = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))


def launch(
    settings: LauncherSettings,
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> Sequence[JobReturn]:
    """Runs a batch of jobs; a sweeper of Hydra may ask for several, one after another. The JobReturns are in order.

    A failed job's JobReturn raises one UserError that names all that failed. Raises UserError, KeyboardInterrupt, Terminated.
    """
    began = time.monotonic()
    setup_globals()
    folder = judging.folder_of_sweep(config)
    jobs = {initial_job_idx + place: list(words) for place, words in enumerate(job_overrides)}
    loader = hydra_context.config_loader
    configs = {number: compose(loader, config, words, number, folder) for number, words in jobs.items()}
    for one in configs.values():
        judging.check_job(task_function, one)
    goal = judging.goal_of(settings, configs[initial_job_idx])
    if changes_points(settings.scheduler):
        raise UserError(
            "scheduler=pbt needs a space, and the launcher has jobs",
            why="it changes the parameters of trials under way",
            fix=[
                sweep_command("scheduler=asha"),
                rewritten(["-m", "hydra/sweeper=ray_tune", "hydra.sweeper.scheduler=pbt", SPACE]),
            ],
        )
    longest = max(judging.max_epochs_of(one) for one in configs.values())
    scheduler = build_scheduler(settings, None, longest)
    warn_without_effect(settings)
    identity = {"kind": "launcher", "metric": goal.metric, "mode": goal.mode, "scheduler": settings.scheduler}
    with open_sweep(folder, identity, settings.resume) as journal:
        _check_jobs(journal, jobs, folder)
        todo = [number for number in jobs if not _is_done(journal, folder, number)]
        if todo:
            log.info(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them done before, in {os.path.relpath(folder)}")
            with connected(settings.ray):
                check_shared(folder)
                shares = {number: resources_of(configs[number], settings, len(jobs)) for number in jobs}
                plan = Jobs(jobs)
                context = make_context(
                    task_function,
                    config,
                    loader,
                    plan=plan,
                    goal=goal,
                    sweep_dir=folder,
                    keeps_checkpoints=judging.keeps_checkpoints(scheduler),
                    grace_s=settings.grace_s,
                    ship_code=settings.ray.ship_code,
                )
                room = max(at_once(shares[number], settings.max_concurrent) for number in todo)
                total = len(journal.trials.keys() | jobs.keys())
                display = SweepDisplay(journal, goal, total=total, max_epochs=longest, concurrent=room)
                Again.handed_out = [{"job": number} for number in jobs if number in journal.trials]
                Again.failed = [point for point in Again.handed_out if journal.trials[point["job"]].state == FAILED]
                run_trials(
                    Sweep(context, settings, journal, display, goal.mode, longest),
                    search=trials_of(GivenJobs(list(jobs)), settings.max_concurrent),
                    scheduler=scheduler,
                    space={},
                    num_samples=-1,
                    resources=lambda point: shares[point["job"]],
                    at_once=room,
                    state=f"jobs-{initial_job_idx}",
                )
        conclude(folder, journal, goal)
        if todo and settings.ray.init.address is None and settings.scheduler == "none":
            say_if_basic_is_faster(journal, todo, time.monotonic() - began)
        failed = failures(journal)
        return [_job_return(folder, journal, number, configs[number], failed) for number in jobs]


def _check_jobs(journal: Journal, jobs: dict[int, list[str]], folder: Path) -> None:
    for number, words in jobs.items():
        before = journal.trials.get(number)
        if before is not None and before.overrides != words:
            raise UserError(
                f"{folder.name} is the folder of another sweep",
                where=str(folder),
                why=f"job {number} was: {' '.join(before.overrides)}\nand is now: {' '.join(words)}",
                fix=named(folder.name, "-2"),
            )


def _is_done(journal: Journal, folder: Path, number: int) -> bool:
    trial = journal.trials.get(number)
    return trial is not None and trial.state in (FINISHED, PRUNED, DIVERGED) and returned_file(folder, number).exists()


def _job_return(folder: Path, journal: Journal, number: int, config: DictConfig, failed: UserError | None) -> JobReturn:
    task = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    hydra = OmegaConf.masked_copy(config, "hydra")
    result = JobReturn(
        overrides=OmegaConf.to_container(config.hydra.overrides.task),
        cfg=task,
        hydra_cfg=hydra,
        working_dir=str(Path.cwd()),
        task_name=str(config.hydra.job.name),
    )
    if _is_done(journal, folder, number):
        result.status = JobStatus.COMPLETED
        result.return_value = json.loads(returned_file(folder, number).read_text(encoding="utf-8"))["value"]
        return result
    result.status = JobStatus.FAILED
    result.return_value = failed or UserError(
        f"job {number} did not come to its end",
        where=str(folder / str(number)),
        why="the sweep's time was over, or its process was ended before it had measured its best weights",
        fix=named(folder.name),
    )
    return result
