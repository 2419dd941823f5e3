"""Builds Lightning's Trainer from the config: device, precision, loggers, callbacks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning as L

from src.callbacks.freezing import FreezingSchedule
from src.config import Checkpoint
from src.engine import features
from src.engine.memory.memory_log import MemoryLog
from src.engine.processes.sync_batchnorm import SyncedBatchNorm
from src.engine.runs.checkpoint_selection import BestCheckpoint, WeightAverage
from src.engine.runs.job import Job
from src.engine.runs.loggers import build_loggers
from src.engine.runs.metrics_csv import EpochRow, MetricsCsv
from src.engine.runs.non_finite import NonFinite
from src.engine.runs.own_callbacks import own_callback
from src.engine.runs.patience import Patience
from src.engine.runs.position import PositionCheckpoint, StopAtMaxSteps, StopOnSignal
from src.engine.runs.progress import EpochBar, EpochLines, Throughput
from src.engine.runs.writing import DurableCheckpointIO
from src.engine.steps.out_of_memory import OutOfMemory
from src.strategies.building import build_precision, build_strategy
from src.task import Task


def build_trainer(job: Job, task: Task) -> L.Trainer:
    """Raises UserError for a logger that is not installed or a callback that is not allowed."""
    config, folder, settings = job.config, job.folder.path, job.config.trainer
    kind = job.devices[0].type
    metrics = MetricsCsv(folder / "metrics.csv")
    return L.Trainer(
        accelerator="gpu" if kind == "cuda" else kind,
        devices=[device.index for device in job.devices] if kind == "cuda" else len(job.devices),
        num_nodes=settings.num_nodes,
        strategy=build_strategy(config, job.devices),
        max_epochs=task.freezing.max_epochs,
        max_time=settings.max_time,
        limit_train_batches=settings.limit_batches,
        limit_val_batches=settings.limit_batches,
        callbacks=build_callbacks(job, task, metrics),
        logger=[metrics, *build_loggers(config.logger, folder)],
        plugins=[
            DurableCheckpointIO(config.checkpoint.background),
            build_precision(config, job.devices[0]),  # not by name: Lightning would turn fp16 on a CPU into bf16
            *([SyncedBatchNorm()] if config.strategy.sync_batchnorm else []),  # Lightning's own drops activations
        ],
        default_root_dir=folder,
        use_distributed_sampler=False,  # src/engine/images/sampler.py divides the batches
        num_sanity_val_steps=0,  # the first validation comes soon enough, and this one would move random states
        enable_model_summary=False,  # src/engine/runs/introduction.py writes a better one
        enable_progress_bar=False,  # src/engine/runs/progress.py has one
        log_every_n_steps=10**9,  # everything is logged once per epoch
    )


def build_callbacks(job: Job, task: Task, metrics: MetricsCsv) -> list[L.Callback]:
    """In the order in which Lightning calls them."""
    config, folder = job.config, job.folder
    policy = (
        "stop" if features.overlaps(config) else config.oom.policy
    )  # no step of several parts can be repeated in parts
    callbacks: list[L.Callback] = [
        FreezingSchedule(task.freezing, config.freeze.batchnorm_momentum),
        Throughput(),
        OutOfMemory(policy, config.oom.grow_after, config.memory.history),
        NonFinite(config.trainer.on_nan, folder.path),
    ]
    if config.memory.log:
        callbacks.append(MemoryLog(folder.path / "memory.csv", everything_trains_from=max(task.freezing.phases)))
    callbacks += [EpochRow(metrics), EpochLines(), *checkpoint_callbacks(config.checkpoint, folder.checkpoints)]
    callbacks += [own_callback(entry) for entry in config.callbacks.extra]
    if config.trainer.max_steps > 0:
        callbacks.append(StopAtMaxSteps(config.trainer.max_steps))
    if config.trainer.patience is not None:
        begin = max((epoch for epoch in task.freezing.phases if epoch < task.freezing.max_epochs), default=0)
        callbacks.append(Patience(config.checkpoint.monitor, config.trainer.patience, config.trainer.min_delta, begin))
    if sys.stdout.isatty() and os.environ.get("RANK", "0") == "0":
        callbacks.append(EpochBar())
    return callbacks + [callback for feature in features.FEATURES for callback in feature.callbacks(job, task)]


def checkpoint_callbacks(config: Checkpoint, folder: Path) -> list[L.Callback]:
    """Those that keep weights and positions."""
    top_k = config.top_k or (3 if config.select in ("average_top_k", "greedy_soup") else 1)
    position = PositionCheckpoint(folder, config.every_n_steps, config.every_n_minutes)
    callbacks: list[L.Callback] = [BestCheckpoint(folder, config.monitor, top_k), position, StopOnSignal(position)]
    if config.select == "ema":
        callbacks.append(WeightAverage(0.99 if config.ema_decay is None else config.ema_decay))
    return callbacks
