"""strategy=dp: several devices in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from src.engine import features
from src.engine.commands.rule_kinds import one_machine
from src.engine.commands.schema import Config, Rule

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy


def rules() -> list[Rule]:
    return [one_machine("dp", instead="ddp")]


def build(config: Config, devices: Sequence[torch.device]) -> Strategy:
    """With one device the same as single."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from src.engine.dp.data_parallel import DataParallel

    return DataParallel() if len(devices) > 1 else SingleDeviceStrategy(devices[0])


features.add(
    features.Feature(
        name="dp",
        about="strategy=dp: several devices in one process, each with a chunk of every batch",
        files=("conf/strategy/dp.yaml", "docs/images/dp.png", "tests/gpu/test_dp_on_gpu.py"),
        rules=rules,
        strategies={"dp": features.RoomStrategy(build=build)},
    )
)
