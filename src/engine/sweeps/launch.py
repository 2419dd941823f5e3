"""hydra/launcher=ray_tune: Hydra says which jobs there are, and each becomes a trial of Ray Tune."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from ray.tune.search import Searcher

from src.engine.commands.hydra_words import unquoted
from src.engine.commands.user_command import corrected, named
from src.engine.runs.errors import UserError
from src.engine.sweeps.controller import SweepPlan, run_sweep
from src.engine.sweeps.folder import returned
from src.engine.sweeps.jobs import JOB, HydraSweep, goal_of, most_epochs, shared_settings, without_hydra
from src.engine.sweeps.results import failures, say_if_basic_is_faster
from src.engine.sweeps.schedulers import build_scheduler
from src.engine.sweeps.settings import LauncherSettings, warn_without_effect
from src.engine.sweeps.sweep_journal import OVER, Journal, TrialRecord


class GivenJobs:
    """The points of a sweep whose jobs are given: number -> its overrides. Methods as of SearchPoints."""

    limit = math.inf

    def __init__(self, jobs: dict[int, list[str]]) -> None:
        self.jobs, self.left = jobs, list(jobs)

    def has(self, number: int) -> bool:
        return number in self.jobs

    def read(self, trial: TrialRecord) -> dict[str, Any]:
        """Raises UserError where it was another job."""
        job = self.jobs[trial.number]
        if trial.overrides != job:
            name = Path(trial.folder).parent.name
            raise UserError(
                f"{name} is the folder of another sweep",
                where=trial.folder,
                why=f"job {trial.number} was: {' '.join(trial.overrides)}\nand is now: {' '.join(job)}",
                fix=named(name, "-2"),
            )
        return {JOB: trial.number}

    def take_up(self, points: Mapping[int, Any], values: Mapping[int, float | None]) -> None:
        self.left = [number for number in self.jobs if number not in points]

    def is_over(self) -> bool:
        return not self.left

    def suggest(self) -> dict[str, Any] | str:
        return {JOB: self.left.pop(0)} if self.left else Searcher.FINISHED

    def report(self, number: int, result: dict[str, Any]) -> None: ...

    def complete(self, number: int, value: float | None) -> None: ...

    def overrides(self, point: Mapping[str, Any]) -> list[str]:
        return self.jobs[point[JOB]]

    def params(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that the jobs do not have in common. A value is a number where it reads as one."""
        jobs = {number: dict(word.partition("=")[::2] for word in words) for number, words in self.jobs.items()}
        own = jobs[point[JOB]]
        common = {key for key in own if all(job.get(key) == own[key] for job in jobs.values())}
        return {key.lstrip("+"): _typed(value) for key, value in own.items() if key not in common}


def launch(
    settings: LauncherSettings, hydra: HydraSweep, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> Sequence[JobReturn]:
    """Runs a batch of jobs; a sweeper of Hydra may ask for several, one after another. The JobReturns are in order.

    A failed job's JobReturn raises one UserError that names all that failed. Raises UserError, KeyboardInterrupt, Terminated.
    """
    began = time.time()
    setup_globals()
    is_whole = _is_whole(hydra)
    if settings.retrain and not is_whole:
        raise UserError(
            "hydra.launcher.retrain=true has no effect with a sweeper that hands over its jobs in batches",
            where=f"hydra/sweeper={hydra.config.hydra.runtime.choices['hydra/sweeper']}",
            why="nothing tells which batch is the last, and so which trial wins",
            fix=corrected(remove=["hydra.launcher.retrain"]),
        )
    jobs = dict(enumerate(map(list, job_overrides), start=initial_job_idx))
    configs = {number: hydra.compose(words, number) for number, words in jobs.items()}
    for config in configs.values():
        hydra.check(config)
    goal = goal_of(settings, configs[initial_job_idx])
    scheduler = build_scheduler(settings, None, goal, most_epochs(configs.values()))
    warn_without_effect(settings)
    plan = SweepPlan(
        goal,
        GivenJobs(jobs),
        scheduler,
        identity={"kind": "launcher", "config": _defaults(hydra), "space": {}},
        configs=list(configs.values()),
        total=initial_job_idx + len(jobs),
        first=initial_job_idx,
        is_whole=is_whole,
    )
    journal = run_sweep(plan, settings, hydra)
    worked = [number for number in jobs if number in journal.trials and journal.trials[number].heard > began]
    if worked and settings.ray.init.address is None and settings.scheduler == "none":
        say_if_basic_is_faster(journal, worked, time.time() - began)
    return [_job_return(hydra.folder, journal, number, configs[number]) for number in jobs]


def _is_whole(hydra: HydraSweep) -> bool:
    """Whether all jobs come in one batch."""
    sweeper = hydra.config.hydra.sweeper
    is_basic = hydra.config.hydra.runtime.choices["hydra/sweeper"] == "basic"
    return is_basic and sweeper.get("max_batch_size") is None


def _typed(value: str) -> Any:
    value = unquoted(value)
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _defaults(hydra: HydraSweep) -> dict[str, Any]:
    """The settings of a job without words, which conf/ has."""
    try:
        return shared_settings(hydra.compose([]), [])
    except HydraException:  # a group that has to be chosen
        return {}


def _job_return(folder: Path, journal: Journal, number: int, config: DictConfig) -> JobReturn:
    result = JobReturn(
        overrides=OmegaConf.to_container(config.hydra.overrides.task),
        cfg=without_hydra(config),
        hydra_cfg=OmegaConf.masked_copy(config, "hydra"),
        working_dir=str(Path.cwd()),
        task_name=str(config.hydra.job.name),
    )
    trial, value = journal.trials.get(number), returned(folder, number)
    if trial is not None and trial.state in OVER and value is not None:
        result.status, result.return_value = JobStatus.COMPLETED, value["value"]
        return result
    result.status = JobStatus.FAILED
    result.return_value = failures(journal) or UserError(
        f"job {number} did not come to its end",
        where=str(folder / str(number)),
        why="the sweep's time was over, or its process was ended before it had measured its best weights",
        fix=named(folder.name),
    )
    return result
