"""The door through which Hydra finds hydra/launcher=ray_tune and hydra/sweeper=ray_tune; what they do is in src/engine/sweeps/.

Hydra imports every module below hydra_plugins at every start, so ray comes with the first sweep. There is no __init__.py
beside this file: it would hide the plugins of other packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from src.engine.sweeps.ray_environment import own_handlers, quiet_ray
from src.engine.sweeps.settings import LauncherSettings, SweeperSettings


class RayTuneLauncher(Launcher):
    """Hydra's sweeper says which jobs there are; each is a trial of Ray Tune."""

    def __init__(self, **settings: Any) -> None:
        self.settings = LauncherSettings(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        quiet_ray(self.settings.ray.init.address)
        with own_handlers():
            from src.engine.sweeps.jobs import HydraSweep
            from src.engine.sweeps.launch import launch

        return launch(self.settings, HydraSweep(*self.hydra), job_overrides, initial_job_idx)


class RayTuneSweeper(Sweeper):
    """Ray Tune chooses the points of a space, and each is a job."""

    def __init__(self, **settings: Any) -> None:
        self.settings = SweeperSettings(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        quiet_ray(self.settings.ray.init.address)
        with own_handlers():
            from src.engine.sweeps.jobs import HydraSweep
            from src.engine.sweeps.sweep import sweep

        return sweep(self.settings, HydraSweep(*self.hydra), arguments)
