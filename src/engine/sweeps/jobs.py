"""The jobs of a sweep on the driver: composed by Hydra, checked, and packed for the worker that runs them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cloudpickle
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from src.engine.commands.schema import METRICS
from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError
from src.engine.runs.run_settings import flat
from src.engine.sweeps.settings import SweepSettings, not_a_choice
from src.engine.sweeps.sweep_journal import Goal

# Keys in the config of a trial, beside its point.
JOB = "job"  # its number
CONFIG = "config"  # of its job, packed
FINISH_AFTER = "finish_after"  # the epoch at which an earlier start stopped the trial, before it was measured

SUBDIR = "${hydra.job.num}"


@dataclass(frozen=True)
class HydraSweep:
    """What Hydra hands to a plugin."""

    context: HydraContext
    task: TaskFunction
    config: DictConfig

    @cached_property
    def folder(self) -> Path:
        """Absolute, because workers may run elsewhere; composed once, because its name may be made of the time.

        Raises UserError where trials would not be in numbered folders.
        """
        subdir = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["subdir"]
        if subdir != SUBDIR:
            raise UserError(
                f"hydra.sweep.subdir={subdir} has no effect with Ray Tune",
                why="the folder of a trial is its number, by which a sweep that is taken up finds it",
                fix=corrected(remove=["hydra.sweep.subdir"]),
            )
        return Path(str(self.config.hydra.sweep.dir)).absolute()

    def compose(self, overrides: Sequence[str], number: int = 0) -> DictConfig:
        """The whole config of a job, hydra: included, as Hydra's own launcher makes it. Raises HydraException."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.job.num = number
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.sweep.dir = str(self.folder)
            config.hydra.runtime.output_dir = str(self.folder / str(number))
        return config

    def check(self, config: DictConfig) -> None:
        """Has the task say now what it would refuse in a worker, if it has an attribute `check`. Raises UserError."""
        check: Any = getattr(self.task, "check", None)
        if check is not None:
            check(without_hydra(config))


def packed(config: DictConfig) -> bytes:
    """A composed config for a worker, with the types of its schema. The task's settings are resolved here, so that the worker
    need not know the program's own resolvers."""
    config = copy.deepcopy(config)
    current = HydraConfig.instance()
    before = current.cfg
    current.set_config(config)  # below, ${hydra:...} is that of the job
    try:
        with read_write(config):
            for key in config:
                if key == "hydra" or OmegaConf.is_missing(config, key):
                    continue
                if OmegaConf.is_interpolation(config, key):
                    config[key] = config[key]
                elif OmegaConf.is_config(config[key]):
                    OmegaConf.resolve(config[key])
    finally:
        current.cfg = before
    return cloudpickle.dumps(config)


def without_hydra(config: DictConfig) -> DictConfig:
    """What the task gets of a composed config."""
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def goal_of(settings: SweepSettings, config: DictConfig) -> Goal:
    """What trials are judged by. Raises UserError."""
    metric = settings.metric or OmegaConf.select(config, "checkpoint.monitor", default="objective")
    mode = settings.mode or METRICS.get(metric) or ("min" if "loss" in metric or "error" in metric else "max")
    if mode not in ("max", "min"):
        raise not_a_choice("mode", mode, ("max", "min"))
    return Goal(metric, mode)


def most_epochs(configs: Iterable[DictConfig]) -> int | None:
    """Epochs of the longest trial; None where a trial's follow from its images (trainer.max_epochs=auto)."""
    epochs = [OmegaConf.select(config, "trainer.max_epochs", default=100) for config in configs]
    return None if "auto" in epochs else max(map(int, epochs))


def shared_settings(config: DictConfig, swept: Sequence[str]) -> dict[str, Any]:
    """The settings that all trials share, by key. swept: the keys that differ between them."""
    settings = flat(OmegaConf.to_container(without_hydra(config), resolve=False))
    return {key: value for key, value in settings.items() if not any(f"{key}.".startswith(f"{one}.") for one in swept)}
