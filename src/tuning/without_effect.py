"""What was set for a sweep and does nothing beside its other settings: said before the sweep starts."""

from __future__ import annotations

import logging
from operator import attrgetter
from typing import Any

from src.tuning.settings import SweeperSettings, Trials

log = logging.getLogger(__name__)


def warn_without_effect(settings: Trials) -> None:
    """A line for each setting that is not its default and that nothing will read."""
    node = "hydra.sweeper" if isinstance(settings, SweeperSettings) else "hydra.launcher"
    for name, why in without_effect(settings).items():
        log.warning(f"{node}.{name}={attrgetter(name)(settings)} has no effect: {why}")


def without_effect(settings: Trials) -> dict[str, str]:
    """The name of each such setting -> why."""
    scheduler: Any = settings.scheduler if isinstance(settings.scheduler, str) else "a class, which has its own keys"
    reads = {"grace_epochs": ("asha", "median", "pbt"), "reduction_factor": ("asha", "hyperband")}
    why = {
        name: f"it is for scheduler={' and '.join(readers)}, and scheduler is {scheduler}"
        for name, readers in reads.items()
        if scheduler not in readers
    }
    if settings.ray.init.address is None:
        why["ray.ship_code"] = "without ray.init.address all trials run on this machine, which has the code"
    else:
        why["ray.init.num_cpus"] = "a cluster's machines say themselves how many cores they have (ray start --num-cpus)"
    if isinstance(settings, SweeperSettings) and settings.search == "grid" and settings.num_samples != -1:
        why["num_samples"] = "search=grid tries every combination"
    return {
        name: text for name, text in why.items() if attrgetter(name)(settings) != attrgetter(name)(type(settings)())
    }
