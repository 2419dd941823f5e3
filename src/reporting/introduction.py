"""What a run prints before its first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from src.callbacks import freezing
from src.callbacks.freezing import Phases
from src.config import Config
from src.data.pictures import Pictures
from src.models.network import TransferNetwork
from src.preprocessing import Preprocessing
from src.reporting.summary import write_summary
from src.run_dir import RunFolder

log = logging.getLogger(__name__)


def introduce(
    config: Config,
    folder: RunFolder,
    pictures: Pictures,
    network: TransferNetwork,
    weights: str,
    preprocessing: Preprocessing,
    steps: int,
    devices: Sequence[torch.device],
    phases: Phases,
) -> None:
    """Says what is about to happen, and writes the model's summary. devices: those of this machine."""
    counts = ", ".join(f"{len(members)} {split}" for split, members in pictures.splits.items())
    log.info(f"run       {folder.path}")
    log.info(f"pictures  {len(pictures.names)} in {len(pictures.classes)} classes: {counts}")
    log.info(f"backbone  {config.model.backbone}: {weights}")
    log.info(f"model     {write_summary(folder.path / 'model_summary.txt', network, preprocessing.image_size)}")
    log.info(f"freezing  {freezing.described(network, phases, config.trainer.max_epochs)}")
    where = f"{described(config, devices)}, {config.precision.name}"
    log.info(f"training  {steps} steps of {config.data.batch_size} pictures on {where}")
    log.info("")


def described(config: Config, devices: Sequence[torch.device]) -> str:
    """The devices of a run in words, such as 'cpu with 2 threads' or '2 x cuda (ddp)'."""
    kind, count = devices[0].type, len(devices) * config.trainer.num_nodes
    number = torch.get_num_threads()
    threads = f" with {number} thread{'s' if number > 1 else ''}" if kind == "cpu" else ""
    return f"{kind}{threads}" if count == 1 else f"{count} x {kind}{threads} ({config.strategy.name})"
