"""The settings of a sweep: the types of conf/hydra/ray_tune.yaml and of launcher/ and sweeper/ray_tune.yaml beside it.

Hydra reads this at every start, so neither ray nor torch is imported here. `sweep_command` and `not_a_choice` are for the
messages about a setting.
"""

from __future__ import annotations

import difflib
import functools
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from src.engine.commands.suggestions import did_you_mean
from src.engine.commands.user_command import corrected, key_of, rewritten, typed_words
from src.engine.runs.errors import UserError

log = logging.getLogger(__name__)

PLUGINS = Path(__file__).parent / "plugins"  # Hydra looks for hydra_plugins in the folders of sys.path
SPACE = "optimizer.lr=tag(log,interval(1e-5,1e-1))"  # in commands that are suggested


@dataclass(kw_only=True)
class Resources:
    cpu: float | None = None  # cores of a trial on each machine; null: the machine's, divided by the trials at once
    gpu: float | None = None  # GPUs of a trial on each machine, 0.5: two trials share one; null: trainer.devices


@dataclass(kw_only=True)
class RayInit:
    address: str | None = None  # auto, or HOST:PORT of a Ray cluster; null: Ray is started on this machine and ended
    num_cpus: int | None = None  # of Ray on this machine: cores that the trials share; null: all


@dataclass(kw_only=True)
class Ray:
    init: RayInit = field(default_factory=RayInit)
    ship_code: bool = False  # machines of the cluster that do not see this folder get a copy of src/ and conf/


@dataclass(kw_only=True)
class SweepSettings:
    """The settings of the launcher and of the sweeper."""

    _recursive_: bool = False
    _convert_: str = "object"
    metric: str | None = None  # the metric that a trial is judged by; null: checkpoint.monitor
    mode: str | None = None  # max or min; null: the metric's own direction
    scheduler: Any = "none"  # none, asha, median, hyperband, pbt, or {_target_: ray.tune.schedulers.NAME, ...}
    grace_epochs: int = 3  # epochs that every trial gets (asha, median); of pbt: between two exchanges
    reduction_factor: float = 3  # keep 1 of every reduction_factor trials at each rung (asha, hyperband)
    time_budget_s: float | None = None  # seconds after which the sweep ends with what it has; null: no limit
    max_concurrent: int | None = None  # trials at once; null: as many as there is room for
    resources: Resources = field(default_factory=Resources)
    max_failures: int = 2  # how often a trial whose process died goes on from its checkpoint in a new one
    grace_s: float = 60.0  # seconds that a trial which was told to end has for saving, measuring and its report
    reuse_actors: bool = True  # one process runs many trials, one after another: no imports for each
    retrain: bool = False  # true: at the end the best trial's settings are trained once more, with another seed
    resume: str = "auto"  # auto: a sweep of this folder continues; true: it has to be there; false: it must not
    ray: Ray = field(default_factory=Ray)


@dataclass(kw_only=True)
class LauncherSettings(SweepSettings):
    _target_: str = "hydra_plugins.ray_tune.RayTuneLauncher"


@dataclass(kw_only=True)
class SweeperSettings(SweepSettings):
    _target_: str = "hydra_plugins.ray_tune.RayTuneSweeper"
    search: Any = "random"  # random, grid, optuna, bayesopt, or {_target_: ray.tune.search.PATH, ...}
    num_samples: int = 20  # trials; -1: until time_budget_s is over, or all of a grid
    seed: int = 0  # of the points that are tried
    default_first: bool = True  # trial 0 is the config as it is, so that a sweep never ends below it
    params: dict[str, Any] = field(default_factory=dict)  # key: values, as on the command line
    dry_run: bool = False  # true: say what would be done, and do nothing


@functools.cache  # Hydra 1.4 warns of what is stored twice
def register() -> None:
    """Makes hydra/launcher=ray_tune and hydra/sweeper=ray_tune known to Hydra, which finds plugins by their namespace."""
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="ray_tune_schema", node=LauncherSettings, provider="ray_tune")
    store.store(group="hydra/sweeper", name="ray_tune_schema", node=SweeperSettings, provider="ray_tune")


def warn_without_effect(settings: SweepSettings) -> None:
    """A line for each setting that is not its default and that nothing will read."""
    node = "hydra.sweeper" if isinstance(settings, SweeperSettings) else "hydra.launcher"
    scheduler: Any = settings.scheduler if isinstance(settings.scheduler, str) else "a class, which has its own keys"
    readers = {"grace_epochs": ("asha", "median", "pbt"), "reduction_factor": ("asha", "hyperband")}
    unread = {
        name: f"it is for scheduler={' and '.join(names)}, and scheduler is {scheduler}"
        for name, names in readers.items()
        if scheduler not in names
    }
    if settings.ray.init.address is None:
        unread["ray.ship_code"] = "without ray.init.address all trials run on this machine, which has the code"
    else:
        unread["ray.init.num_cpus"] = (
            "a cluster's machines say themselves how many cores they have (ray start --num-cpus)"
        )
    if isinstance(settings, SweeperSettings) and settings.search == "grid" and settings.num_samples != -1:
        unread["num_samples"] = "search=grid tries every combination"
    defaults = type(settings)()
    for name, why in unread.items():
        if (value := attrgetter(name)(settings)) != attrgetter(name)(defaults):
            log.warning(f"{node}.{name}={value} has no effect: {why}")


def sweep_command(*words: str, remove: Sequence[str] = ()) -> str:
    """The user's command with these words; a setting without a section, such as scheduler=asha, is the sweep's own.

    A program that is not src.train has no such command: then it is a whole example.
    """
    own = {knob.name for knob in fields(SweeperSettings)} - {"seed"}
    by_launcher = any(key_of(word).startswith(("hydra/launcher", "hydra.launcher")) for word in typed_words())
    section = "hydra.launcher" if by_launcher else "hydra.sweeper"
    named = [f"{section}.{word}" if key_of(word).partition(".")[0] in own else word for word in words]
    if typed_words():
        return corrected(*named, remove=[f"{section}.{key}" if key in own else key for key in remove])
    space = [SPACE] if not any(word.startswith(("optimizer.lr=", "seed=")) for word in named) else []
    return rewritten(["-m", section.replace(".", "/") + "=ray_tune", *named, *space])


def not_a_choice(setting: str, value: Any, choices: Sequence[str], other: str = "") -> UserError:
    """The error for a setting that has none of its values. other: what it may be besides these."""
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return UserError(
        f"{setting}={value} is not a choice{did_you_mean(*close)}",
        why=f"{setting} is one of: {', '.join(choices)}{other}",
        fix=sweep_command(f"{setting}={(close or choices)[0]}"),
    )
