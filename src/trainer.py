"""Builds Lightning's Trainer from the config: device, precision, loggers, callbacks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from hydra.utils import get_object
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from src.callbacks.averaging import WeightAverage
from src.callbacks.checkpoint_selection import BestCheckpoint
from src.callbacks.freezing import FreezingSchedule, Phases
from src.callbacks.gpu_memory import MemoryLog
from src.callbacks.limits import StopAtMaxSteps
from src.callbacks.memory_growth import MemoryGrowth
from src.callbacks.non_finite import NonFinite
from src.callbacks.out_of_memory import OutOfMemory
from src.callbacks.own_settings import OwnSettings
from src.callbacks.position import PositionCheckpoint, StopOnSignal
from src.callbacks.progress import EpochBar, EpochLines, Throughput
from src.callbacks.trial_report import TrialReport
from src.checkpoints.writing import DurableCheckpointIO
from src.config import Checkpoint, Config, Memory
from src.config import Logger as LoggerConfig
from src.errors import ExitCode, UserError
from src.reporting.metrics_csv import EpochRow, MetricsCsv
from src.run_dir import RunFolder
from src.strategies.building import build_precision, build_strategy, can_repeat_steps
from src.strategies.sync_batchnorm import SyncedBatchNorm
from src.trial import current
from src.user_command import corrected

Kind = TypeVar("Kind", bound=L.Callback)


def build_trainer(config: Config, folder: RunFolder, devices: Sequence[torch.device], phases: Phases) -> L.Trainer:
    """The Trainer of a run. devices: those of this machine that it uses.

    Raises UserError for a logger that is not installed or a callback that is not allowed.
    """
    settings, kind = config.trainer, devices[0].type
    metrics = MetricsCsv(folder.path / "metrics.csv")
    callbacks: list[L.Callback] = [
        FreezingSchedule(phases, config.freeze.batchnorm, config.freeze.batchnorm_momentum),
        Throughput(),
        OutOfMemory(
            config.oom.policy if can_repeat_steps(config) else "stop", config.oom.grow_after, config.memory.history
        ),
        NonFinite(settings.on_nan, folder.path),
        *_memory_watchers(config.memory, folder.path / "memory.csv", phases),
        EpochRow(metrics),
        EpochLines(),
        *_checkpoints(config.checkpoint, folder.checkpoints),
        *[_own_callback(entry) for entry in config.callbacks.extra],
    ]
    if settings.max_steps > 0:
        callbacks.append(StopAtMaxSteps(settings.max_steps))
    if sys.stdout.isatty() and os.environ.get("RANK", "0") == "0":
        callbacks.append(EpochBar())
    return L.Trainer(
        accelerator={"cuda": "gpu"}.get(kind, kind),
        devices=[device.index for device in devices] if kind == "cuda" else len(devices),
        num_nodes=settings.num_nodes,
        strategy=build_strategy(config, devices),
        max_epochs=settings.max_epochs,
        max_time=settings.max_time,
        limit_train_batches=settings.limit_batches,
        limit_val_batches=settings.limit_batches,
        gradient_clip_val=settings.gradient_clip,
        callbacks=callbacks,
        logger=[metrics, *_loggers(config.logger, folder.path)],
        plugins=[
            DurableCheckpointIO(config.checkpoint.background),
            build_precision(config, devices[0]),  # not by name: Lightning would turn fp16 on a CPU into bf16
            *([SyncedBatchNorm()] if config.strategy.sync_batchnorm else []),  # Lightning's own drops activations
        ],
        default_root_dir=folder.path,
        use_distributed_sampler=False,  # src/data/sampler.py divides the batches
        num_sanity_val_steps=0,  # the first validation comes soon enough, and this one would move random states
        enable_model_summary=False,  # src/reporting/summary.py writes a better one
        enable_progress_bar=False,  # src/callbacks/progress.py has one
        log_every_n_steps=10**9,  # everything is logged once per epoch
    )


def find_callback(trainer: L.Trainer, kind: type[Kind]) -> Kind | None:
    """The trainer's callback of that class, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def _memory_watchers(config: Memory, path: Path, phases: Phases) -> list[L.Callback]:
    callbacks: list[L.Callback] = []
    if config.log:
        callbacks.append(MemoryLog(path, everything_trains_from=max(phases)))
    if config.detect_growth:
        callbacks.append(MemoryGrowth())
    return callbacks


def _checkpoints(config: Checkpoint, folder: Path) -> list[L.Callback]:
    """What is kept of the weights, and of the position."""
    top_k = config.top_k or (3 if config.select == "average_top_k" else 1)
    position = PositionCheckpoint(folder, config.every_n_steps, config.every_n_minutes)
    stop = StopOnSignal(position)
    callbacks: list[L.Callback] = [BestCheckpoint(folder, config.monitor, top_k), position, stop]
    if (trial := current()) is not None:
        callbacks.append(TrialReport(trial, stop))
        if trial.keeps_checkpoints:
            callbacks.append(OwnSettings())
    if config.select == "ema":
        callbacks.append(WeightAverage(0.99 if config.ema_decay is None else config.ema_decay))
    return callbacks


def _loggers(config: LoggerConfig, folder: Path) -> list[Logger]:
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False))
    if config.wandb:
        _need("wandb", "wandb")
        loggers.append(WandbLogger(folder.name, folder, project=config.project, offline=config.offline))
    if config.mlflow:
        _need("mlflow", "mlflow")
        uri = config.tracking_uri or f"sqlite:///{folder.parent.absolute()}/mlflow.db"
        loggers.append(MLFlowLogger(config.project, run_name=folder.name, tracking_uri=uri))
    return loggers


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"logger={extra} needs the package {package}, which is not installed",
            why="it is an extra, so that those who do not use it need not install it",
            fix=[
                f'pip install -e ".[{extra}]"',
                corrected("logger=default", remove=["logger.project", "logger.offline", "logger.tracking_uri"]),
            ],
            code=ExitCode.UNAVAILABLE,
        )


def _own_callback(entry: Any) -> L.Callback:
    """{_target_: src.callbacks.mine.MyCallback, key: value}: a callback class of this project, called with the keys.

    Nothing else is ever called: a _target_ such as torch.load would be code from a config file.
    """
    target = entry.get("_target_") if isinstance(entry, dict) else None
    made = None
    if isinstance(target, str) and target.startswith("src."):
        try:
            made = get_object(target)
        except Exception as error:
            raise _refused(entry, f"it cannot be imported: {error}") from error
    if not (isinstance(made, type) and issubclass(made, L.Callback) and made.__module__.startswith("src.")):
        raise _refused(entry, "a callback is a class below src. that inherits from lightning.Callback")
    values = {key: value for key, value in entry.items() if key != "_target_"}
    try:
        return made(**values)
    except TypeError as error:
        raise _refused(entry, str(error)) from error


def _refused(entry: Any, why: str) -> UserError:
    target = str(entry.get("_target_", "") if isinstance(entry, dict) else "")
    package, _, name = target.rpartition(".")
    fix = [corrected("callbacks.extra=[{_target_: src.callbacks.mine.MyCallback}]")]
    if target.startswith("src.callbacks.mine.") or (target.startswith("src.") and "argument" in why):
        fix = [corrected(f"callbacks.extra=[{{_target_: {target}}}]"), corrected("callbacks.extra=[]")]
    elif package and name.isidentifier() and not target.startswith("src."):  # a class of two lines makes it ours
        keys = "".join(f", {key}: {value}" for key, value in entry.items() if key != "_target_")
        fix = [
            f"printf 'from {package} import {name} as Base\\nclass {name}(Base):\\n    pass\\n' > src/callbacks/mine.py",
            corrected(f"callbacks.extra=[{{_target_: src.callbacks.mine.{name}{keys}}}]"),
        ]
    return UserError(f"callbacks.extra: {entry} is not allowed", where="callbacks.extra", why=why, fix=fix)
