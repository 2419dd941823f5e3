"""From the config to Lightning's strategy, and what it needs of the Trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from src.config import Config
from src.engine.processes.ddp import Ddp
from src.engine.processes.ranks import DEFAULT_TIMEOUT_SECONDS
from src.engine.steps.precision import precision_plugin
from src.strategies.data_parallel import DataParallel


def build_strategy(config: Config, devices: Sequence[torch.device]) -> Strategy:
    """The strategy of a run. devices: those of this machine; where they are one, ddp and dp are the same as single."""
    settings = config.strategy
    seconds = settings.timeout_seconds or DEFAULT_TIMEOUT_SECONDS
    if settings.name == "pipeline":
        from src.engine.pipeline.pipeline import Pipeline  # torch's pipelining takes a second to import

        return Pipeline(settings.micro_batches, settings.schedule, seconds)
    if settings.name == "model_parallel":
        from src.strategies.model_parallel import build_model_parallel

        return build_model_parallel(settings.micro_batches, settings.schedule)
    if settings.name == "ddp" and len(devices) * config.trainer.num_nodes > 1:
        return Ddp(seconds)
    if settings.name == "dp" and len(devices) > 1:
        return DataParallel()
    return SingleDeviceStrategy(devices[0])


def build_precision(config: Config, device: torch.device) -> Precision:
    """The arithmetic of a run, for Lightning."""
    if config.strategy.name == "pipeline":
        from src.engine.pipeline.pipeline_precision import stage_precision

        return stage_precision(config.precision.name, device)
    return precision_plugin(config.precision.name, device)


def can_repeat_steps(config: Config) -> bool:
    """Whether a step that ran out of memory can be repeated in parts: not where stages have parts under way already."""
    return config.strategy.name != "pipeline" and (config.strategy.micro_batches or 1) == 1
