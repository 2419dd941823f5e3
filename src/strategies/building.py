"""From the config to Lightning's strategy, and what it needs of the Trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from src.config import Config
from src.engine import features
from src.engine.own import build_part, is_own
from src.engine.processes.ddp import Ddp
from src.engine.processes.ranks import DEFAULT_TIMEOUT_SECONDS
from src.engine.steps.precision import precision_plugin


def build_strategy(config: Config, devices: Sequence[torch.device]) -> Strategy:
    """The strategy of a run. devices: those of this machine; where they are one, ddp is the same as single."""
    settings = config.strategy
    if is_own(settings.name):
        given = {
            "config": config,
            "devices": devices,
            "timeout_seconds": settings.timeout_seconds or DEFAULT_TIMEOUT_SECONDS,
        }
        return build_part("strategy.name", settings.name, {}, given, settings.options, Strategy)
    if settings.name in features.strategies():
        return features.strategies()[settings.name].build(config, devices)
    if settings.name == "ddp" and len(devices) * config.trainer.num_nodes > 1:
        return Ddp(settings.timeout_seconds or DEFAULT_TIMEOUT_SECONDS)
    return SingleDeviceStrategy(devices[0])


def build_precision(config: Config, device: torch.device) -> Precision:
    """The arithmetic of a run, for Lightning."""
    room = features.strategies().get(config.strategy.name)
    build = precision_plugin if room is None or room.precision is None else room.precision
    return build(config.precision.name, device)
