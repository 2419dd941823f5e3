"""What a sweep needs to know of a job's config: by what it is judged, how long it is, and whether it can run at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf
from ray.tune.schedulers import HyperBandScheduler, PopulationBasedTraining, TrialScheduler

from src.config import METRICS
from src.errors import UserError
from src.reporting.goal import Goal
from src.run_settings import flat
from src.tuning.commands import sweep_command
from src.tuning.settings import Trials
from src.user_command import corrected

SUBDIR = "${hydra.job.num}"


def folder_of_sweep(config: DictConfig) -> Path:
    """Absolute, since a worker may run elsewhere. Raises UserError where trials would not be in numbered folders."""
    subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]
    if subdir != SUBDIR:
        raise UserError(
            f"hydra.sweep.subdir={subdir} has no effect with Ray Tune",
            why="the folder of a trial is its number, by which a sweep that is taken up finds it",
            fix=corrected(remove=["hydra.sweep.subdir"]),
        )
    return Path(str(config.hydra.sweep.dir)).absolute()


def goal_of(settings: Trials, config: DictConfig) -> Goal:
    """By what trials are judged. Raises UserError."""
    metric = settings.metric or OmegaConf.select(config, "checkpoint.monitor", default="objective")
    mode = settings.mode or METRICS.get(metric) or ("min" if "loss" in metric or "error" in metric else "max")
    if mode not in ("max", "min"):
        raise UserError(f"mode={mode} is not a choice", why="mode is max or min", fix=sweep_command("mode=max"))
    return Goal(metric, mode)


def max_epochs_of(config: DictConfig) -> int:
    return int(OmegaConf.select(config, "trainer.max_epochs", default=100))


def settings_of(config: DictConfig, swept: Sequence[str]) -> dict[str, Any]:
    """The settings that all trials share, by key. swept: the keys that differ between them."""
    task = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    settings = flat(OmegaConf.to_container(task, resolve=False))
    return {key: value for key, value in settings.items() if not any(f"{key}.".startswith(f"{one}.") for one in swept)}


def keeps_checkpoints(scheduler: TrialScheduler | None) -> bool:
    """Whether the scheduler pauses trials, or copies one to another, for which Tune has to have checkpoints."""
    return isinstance(scheduler, PopulationBasedTraining | HyperBandScheduler)


def check_job(task: TaskFunction, config: DictConfig) -> None:
    """Has the task say now what it would refuse in a worker. Raises UserError. Its attribute `check` knows, if it has one."""
    check: Any = getattr(task, "check", None)
    if check is not None:
        check(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
