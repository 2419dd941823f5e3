"""hydra/launcher=ray_tune: Hydra says which jobs there are, and each becomes a trial of Ray Tune."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from src.errors import UserError
from src.hydra_words import unquoted
from src.reporting.sweep_journal import OVER, Journal, TrialRecord
from src.tuning import judging
from src.tuning.choices import build_scheduler
from src.tuning.cluster import resources_of
from src.tuning.job import JOB, HydraJob, compose, returned
from src.tuning.pipeline import SweepPlan, run_sweep
from src.tuning.results import failures, say_if_basic_is_faster
from src.tuning.settings import LauncherSettings
from src.tuning.source import TrialSource
from src.tuning.without_effect import warn_without_effect
from src.user_command import named


@dataclass(frozen=True)
class Jobs:
    """The plan of a sweep whose jobs are given: number -> its overrides."""

    jobs: dict[int, list[str]]

    def overrides(self, point: Mapping[str, Any]) -> list[str]:
        return self.jobs[point[JOB]]

    def read(self, trial: TrialRecord) -> dict[str, Any]:
        """The point of a trial of the journal. Raises UserError where it was another job."""
        now = self.jobs[trial.number]
        if trial.overrides != now:
            name = Path(trial.folder).parent.name
            raise UserError(
                f"{name} is the folder of another sweep",
                where=trial.folder,
                why=f"job {trial.number} was: {' '.join(trial.overrides)}\nand is now: {' '.join(now)}",
                fix=named(name, "-2"),
            )
        return {JOB: trial.number}

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


def launch(
    settings: LauncherSettings, hydra: HydraJob, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> Sequence[JobReturn]:
    """Runs a batch of jobs; a sweeper of Hydra may ask for several, one after another. The JobReturns are in order.

    A failed job's JobReturn raises one UserError that names all that failed. Raises UserError, KeyboardInterrupt, Terminated.
    """
    began = time.time()
    setup_globals()
    folder, loader = judging.folder_of_sweep(hydra.config), hydra.context.config_loader
    jobs = {initial_job_idx + place: list(words) for place, words in enumerate(job_overrides)}
    configs = {number: compose(loader, hydra.config, words, number, folder) for number, words in jobs.items()}
    for one in configs.values():
        judging.check_job(hydra.task, one)
    goal = judging.goal_of(settings, configs[initial_job_idx])
    longest = max(judging.max_epochs_of(one) for one in configs.values())
    scheduler = build_scheduler(settings, None, goal, longest)
    warn_without_effect(settings)
    plan = SweepPlan(
        folder,
        goal,
        TrialSource(Jobs(jobs), goal, jobs=list(jobs)),
        scheduler,
        longest,
        identity={
            **{"kind": "launcher", "metric": goal.metric, "mode": goal.mode, "scheduler": settings.scheduler},
            "config": _defaults(hydra, folder),
            "space": {},
        },
        shares=lambda point: resources_of(configs[point[JOB]], settings, len(jobs)),
        total=initial_job_idx + len(jobs),
        example={JOB: initial_job_idx},
        alike=False,
    )
    journal = run_sweep(plan, settings, hydra)
    worked = [number for number in jobs if number in journal.trials and journal.trials[number].heard > began]
    if worked and settings.ray.init.address is None and settings.scheduler == "none":
        say_if_basic_is_faster(journal, worked, time.time() - began)
    failed = failures(journal)
    return [_job_return(folder, journal, number, configs[number], failed) for number in jobs]


def _defaults(hydra: HydraJob, folder: Path) -> dict[str, Any]:
    """The settings of a job without words, which conf/ has."""
    try:
        return judging.settings_of(compose(hydra.context.config_loader, hydra.config, [], 0, folder), [])
    except HydraException:  # a group that has to be chosen
        return {}


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
    trial, said = journal.trials.get(number), returned(folder, number)
    if trial is not None and trial.state in OVER and said is not None:
        result.status = JobStatus.COMPLETED
        result.return_value = said["value"]
        return result
    result.status = JobStatus.FAILED
    result.return_value = failed or UserError(
        f"job {number} did not come to its end",
        where=str(folder / str(number)),
        why="the sweep's time was over, or its process was ended before it had measured its best weights",
        fix=named(folder.name),
    )
    return result
