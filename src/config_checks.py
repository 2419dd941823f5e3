"""From the composed YAML to a checked Config: values that are no choice and settings that contradict each other are refused.

Everything here runs before torch is imported, so a mistake is answered in under a second.
"""

from __future__ import annotations

import logging
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config import METRICS, Config, Data, Oom
from src.config_strategies import check_strategy
from src.errors import ExitCode, UserError
from src.user_command import corrected

log = logging.getLogger(__name__)


def read(composed: DictConfig | dict) -> Config:
    """The composed YAML as dataclasses, checked. Raises UserError."""
    if isinstance(composed, DictConfig):  # plain first: Hydra's + opens the schema to keys that nothing reads
        composed = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    assert isinstance(config, Config)
    _check_choices(config, "")
    _check_ranges(config)
    _check_data(config.data)
    _check_together(config)
    check_strategy(config)
    return config


def _check_choices(node: Any, prefix: str) -> None:
    for knob in fields(node):
        value, options = getattr(node, knob.name), knob.metadata.get("options")
        if is_dataclass(value):
            _check_choices(value, f"{prefix}{knob.name}.")
        elif options and value not in options:
            name = f"{prefix}{knob.name}"
            raise UserError(
                f"{name}={value} is not a choice",
                why=f"{name} takes one of: {', '.join(options)}",
                fix=f"python -m src.train {name}={options[0]}",
            )


def _check_ranges(config: Config) -> None:
    """Numbers that cannot be meant, each with the range that can."""
    data, model, optimizer, trainer = config.data, config.model, config.optimizer, config.trainer
    at_least_one = {
        "model.hidden": model.hidden,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.num_nodes": trainer.num_nodes,
        "trainer.limit_batches": trainer.limit_batches,
        "trainer.threads": trainer.threads,
        "checkpoint.every_n_steps": config.checkpoint.every_n_steps,
        "checkpoint.top_k": config.checkpoint.top_k,
        "oom.grow_after": config.oom.grow_after,
        "freeze.last_n": config.freeze.last_n,
    }
    for name, count in at_least_one.items():
        if count is not None and count < 1:
            raise out_of_range(name, count, "at least 1", 1)
    ranges = [  # name, value, lowest, highest, an example
        ("data.num_workers", data.num_workers, 0, 256, 2),
        ("data.val_fraction", data.val_fraction, 0.01, 0.9, 0.15),
        ("data.test_fraction", data.test_fraction, 0.0, 0.9, 0.15),
        ("data.image_size", data.image_size, 16, 4096, 224),
        ("data.crop_ratio", data.crop_ratio, 0.1, 1.0, 1.0),
        ("data.max_megapixels", data.max_megapixels, 0.001, 10_000, 100),
        ("data.bits", data.bits, 1, 16, 12),
        ("model.dropout", model.dropout, 0.0, 0.95, 0.2),
        ("model.min_match", model.min_match, 0.0, 1.0, 0.9),
        ("model.label_smoothing", model.label_smoothing, 0.0, 0.9, 0.1),
        ("optimizer.lr", optimizer.lr, 1e-12, 100.0, 0.001),
        ("optimizer.backbone_lr_scale", optimizer.backbone_lr_scale, 0.0, 100.0, 0.1),
        ("optimizer.weight_decay", optimizer.weight_decay, 0.0, 10.0, 0.01),
        ("optimizer.warmup_fraction", optimizer.warmup_fraction, 0.0, 0.9, 0.05),
        ("optimizer.momentum", optimizer.momentum, 0.0, 0.9999, 0.9),
        (
            "trainer.gradient_clip",
            trainer.gradient_clip,
            1e-6,
            1e6,
            1.0,
        ),  # Lightning takes 0 and less for "no clipping"
        ("data.num_pictures", data.num_pictures, 1, 10**7, 60),
        ("data.num_classes", data.num_classes, 2, 10**5, 3),
        ("freeze.batchnorm_momentum", config.freeze.batchnorm_momentum, 0.0001, 1.0, 0.1),
        ("freeze.lr_decay", config.freeze.lr_decay, 0.01, 1.0, 0.8),
        ("checkpoint.ema_decay", config.checkpoint.ema_decay, 0.0, 0.99999, 0.99),
        ("checkpoint.every_n_minutes", config.checkpoint.every_n_minutes, 0.01, 10_000, 10),
        ("freeze.unfreeze_epoch", config.freeze.unfreeze_epoch, 0, 10**6, 2),
        ("seed", config.seed, 0, 2**63, 0),
    ]
    if data.batch_size != "auto" and not (type(data.batch_size) is int and data.batch_size >= 1):
        raise out_of_range("data.batch_size", data.batch_size, "a whole number from 1, or auto", 32)
    for name, number, lowest, highest, example in ranges:
        if number is not None and not lowest <= number <= highest:
            raise out_of_range(name, number, f"from {lowest} to {highest}", example)
    if trainer.max_time is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", trainer.max_time):
        raise out_of_range(
            "trainer.max_time", trainer.max_time, "DD:HH:MM:SS: days, hours, minutes, seconds", "00:01:30:00"
        )
    if trainer.max_steps != -1 and trainer.max_steps < 1:
        raise out_of_range("trainer.max_steps", trainer.max_steps, "at least 1, or -1 for no limit", 100)
    if len(data.background) != 3 or not all(0 <= level <= 255 for level in data.background):
        raise out_of_range("data.background", data.background, "three levels from 0 to 255", "[255,255,255]")


def out_of_range(name: str, value: Any, allowed: str, example: Any) -> UserError:
    """The error for a number that cannot be meant; the example parses as an override."""
    return UserError(f"{name}={value} is out of range", why=f"{name} is {allowed}", fix=corrected(f"{name}={example}"))


def _check_data(data: Data) -> None:
    """Each source needs its own settings, and a setting that the source does not look at is a mistake."""
    needs = {"image_folder": "root", "table": "table", "torchvision": "name"}
    examples = {"root": "data.root=photos/", "table": "data.table=labels.csv", "name": "data.name=CIFAR10"}
    used_by = {
        "root": ("image_folder", "table", "torchvision"),
        "table": ("table",),
        "name": ("torchvision",),
        "num_pictures": ("synthetic",),
        "num_classes": ("synthetic",),
        "bits": ("image_folder", "table"),
        "layout": ("image_folder",),
    }
    for name, sources in used_by.items():
        if getattr(data, name) not in (None, Data.layout) and data.source not in sources:
            raise UserError(
                f"data.{name}={getattr(data, name)} has no effect with data={data.source}",
                why=f"only data={' or data='.join(sources)} looks at data.{name}",
                fix=f"python -m src.train data={sources[0]} data.{name}={getattr(data, name)}",
            )
    needed = needs.get(data.source)
    if needed and getattr(data, needed) is None:
        raise UserError(
            f"data.{needed} is missing",
            why=f"data={data.source} needs to know where the pictures are",
            fix=f"python -m src.train data={data.source} {examples[needed]}",
        )
    for name in ("table", "split_file", "root"):
        path = getattr(data, name)
        if path is not None and data.source != "torchvision" and not Path(path).exists():
            raise UserError(
                f"data.{name}={path} does not exist",
                where=str(Path(path).absolute()),
                why="relative paths start from the folder the command is run in",
                fix=f"ls {Path(path).parent}",
                code=ExitCode.NO_INPUT,
            )
    if data.val_fraction + data.test_fraction > 0.9:
        raise UserError(
            f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave too little to train on",
            why="together they may be at most 0.9",
            fix="python -m src.train data.val_fraction=0.15 data.test_fraction=0.15",
        )


def _check_together(config: Config) -> None:
    """Settings that contradict each other."""
    model, optimizer = config.model, config.optimizer
    if model.head == "append" and model.dropout > 0:
        raise UserError(
            f"model.dropout={model.dropout} has no effect with model.head=append",
            why="append is one layer behind the kept classifier, which has its own dropout where it was trained with one",
            fix="python -m src.train model.head=append model.dropout=0",
        )
    if (optimizer.name == "sgd") != (optimizer.momentum is not None):
        raise UserError(
            f"optimizer.momentum={optimizer.momentum} does not go with optimizer={optimizer.name}",
            why="sgd needs a momentum, adamw has none of that name",
            fix="python -m src.train optimizer=sgd optimizer.momentum=0.9",
        )
    if optimizer.schedule == "onecycle" and optimizer.warmup_fraction == 0:
        raise UserError(
            "optimizer.warmup_fraction=0 does not go with optimizer.schedule=onecycle",
            why="one cycle is a rise and a fall: the rise needs steps",
            fix="python -m src.train optimizer.schedule=onecycle optimizer.warmup_fraction=0.3",
        )
    if config.checkpoint.monitor not in METRICS:
        raise UserError(
            f"checkpoint.monitor={config.checkpoint.monitor} is not a metric that is reported",
            why=f"reported are: {', '.join(METRICS)}",
            fix="python -m src.train checkpoint.monitor=val/balanced_acc",
        )
    checkpoint = config.checkpoint
    if checkpoint.ema_decay is not None and checkpoint.select != "ema":
        raise UserError(
            f"checkpoint.ema_decay={checkpoint.ema_decay} has no effect with checkpoint.select={checkpoint.select}",
            why="only checkpoint.select=ema takes a moving average of the weights",
            fix=f"python -m src.train checkpoint.select=ema checkpoint.ema_decay={checkpoint.ema_decay}",
        )
    if checkpoint.select == "average_top_k" and checkpoint.top_k == 1:
        raise UserError(
            "checkpoint.select=average_top_k does not go with checkpoint.top_k=1",
            why="an average needs the weights of two epochs at least",
            fix="python -m src.train checkpoint.select=average_top_k checkpoint.top_k=3",
        )
    if config.oom.policy == "stop" and config.oom.grow_after != Oom().grow_after:
        raise UserError(
            f"oom.grow_after={config.oom.grow_after} has no effect with oom.policy=stop",
            why="only parts of a batch can grow back, and oom.policy=stop makes none",
            fix=f"python -m src.train oom.policy=split oom.grow_after={config.oom.grow_after}",
        )
    phases = config.freeze.phases
    if config.freeze.lr_decay is not None and phases is None and config.freeze.preset == "head_only":
        raise UserError(
            f"freeze.lr_decay={config.freeze.lr_decay} has no effect with freeze.preset=head_only",
            why="it is about the backbone's blocks, and none of them is trained",
            fix=f"python -m src.train freeze.preset=full freeze.lr_decay={config.freeze.lr_decay}",
        )
    if phases is not None and not (
        isinstance(phases, dict)
        and all(type(epoch) is int and epoch >= 0 for epoch in phases)
        and all(isinstance(blocks, list) and blocks for blocks in phases.values())
    ):
        raise UserError(
            f"freeze.phases={phases} is not a schedule",
            why="it says from which epoch on which blocks are trained: {epoch: [block, ...], ...}",
            fix="python -m src.train 'freeze.phases={0:[head],2:[all]}'",
        )
    if phases is not None and 0 not in phases:
        raise UserError(
            f"freeze.phases={config.freeze.phases} says nothing of epoch 0",
            why="the first phase says what is trained from the start; with nothing to train there is no gradient",
            fix="python -m src.train 'freeze.phases={0:[head],2:[all]}'",
        )
    if optimizer.backbone_lr_scale == 0 and (phases is not None or config.freeze.preset != "head_only"):
        log.warning(
            "optimizer.backbone_lr_scale=0: blocks that are unfrozen learn nothing; freeze.preset=head_only is quicker."
        )
    if model.head == "append" and model.weights == "none":
        log.warning("model.head=append keeps the pretrained classifier, but model.weights=none leaves it random.")
