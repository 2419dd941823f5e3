"""From the composed YAML to a checked Config: values that are no choice and settings that contradict each other are refused.

Everything here runs before torch is imported, so a mistake is answered in under a second.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config import METRICS, Config, Data
from src.config_strategies import check_strategy
from src.errors import ExitCode, UserError
from src.files import existing_parent
from src.other_names import option_like
from src.rules import check_rules
from src.run_names import check_name
from src.text import at_home, shell_word
from src.user_command import corrected

ANY = 10**9  # no upper limit that a user meets
RANGES: dict[str, tuple[float, float, Any]] = {  # key: lowest, highest, an example
    "seed": (0, 2**63 - 1, 0),
    "data.num_workers": (0, 256, 2),
    "data.timeout_seconds": (0, 10**6, 300),
    "data.num_images": (1, 10**7, 240),
    "data.num_classes": (2, 10**5, 3),
    "data.val_fraction": (0.01, 0.9, 0.15),
    "data.test_fraction": (0.0, 0.9, 0.15),
    "data.image_size": (16, 4096, 224),
    "data.crop_ratio": (0.1, 1.0, 1.0),
    "data.max_megapixels": (0.001, 10_000, 100),
    "data.bits": (1, 16, 12),
    "model.hidden": (1, 10**5, 512),
    "model.num_classes": (1, 10**5, "null"),
    "model.dropout": (0.0, 0.95, 0.2),
    "model.min_match": (0.0, 1.0, 0.9),
    "model.label_smoothing": (0.0, 0.9, 0.1),
    "optimizer.lr": (1e-12, 100.0, 0.001),
    "optimizer.backbone_lr_scale": (0.0, 100.0, 0.1),
    "optimizer.weight_decay": (0.0, 10.0, 0.01),
    "optimizer.momentum": (0.0, 0.9999, 0.9),
    "optimizer.warmup_fraction": (0.0, 0.9, 0.05),
    "freeze.last_n": (1, ANY, 12),
    "freeze.unfreeze_epoch": (0, 10**6, 2),
    "freeze.lr_decay": (0.01, 1.0, 0.8),
    "freeze.batchnorm_momentum": (0.0001, 1.0, 0.1),
    "checkpoint.top_k": (1, ANY, 3),
    "checkpoint.ema_decay": (0.0, 0.99999, 0.99),
    "checkpoint.every_n_steps": (1, ANY, 100),
    "checkpoint.every_n_minutes": (0.01, 10_000, 10),
    "oom.grow_after": (1, ANY, 200),
    "strategy.timeout_seconds": (1, 10**6, 120),
    "strategy.micro_batches": (1, 10**6, 4),
    "trainer.max_epochs": (1, ANY, 12),
    "trainer.num_nodes": (1, 10**5, 1),
    "trainer.limit_batches": (1, ANY, 10),
    "trainer.threads": (1, 1024, 2),
    "trainer.gradient_clip": (1e-6, 1e6, 1.0),  # Lightning takes 0 and less for "no clipping"
}
EXAMPLE_TEXTS = {
    "data.root": "photos/",
    "data.table": "labels.csv",
    "data.name": "CIFAR10",
    "data.split_file": "runs/first/split.csv",
    "runs_dir": "runs",
    "name": "first",
    "model.weights": "default",
    "model.backbone": "resnet18",
}
# A value that a setting takes, for the commands that are suggested.
EXAMPLES: dict[str, Any] = {name: example for name, (_, _, example) in RANGES.items()} | {
    "data.batch_size": 32,
    "data.background": "[255,255,255]",
    "trainer.max_time": "00:01:30:00",
    "trainer.max_steps": 100,
    "trainer.devices": 1,
    "freeze.phases": "{0:[head],2:[all]}",
    "model.split_at": "[layer2]",
    "callbacks.extra": "[{_target_:src.callbacks.mine.MyCallback}]",
    **EXAMPLE_TEXTS,
}


def read(composed: DictConfig | dict, *, files: bool = True) -> Config:
    """The composed YAML as dataclasses, checked. Raises UserError. files: False where those that it names may be gone."""
    if isinstance(composed, DictConfig):  # plain first: Hydra's + opens the schema to keys that nothing reads
        composed = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), as_text(composed)))
    assert isinstance(config, Config)
    for name in ("root", "table", "split_file"):  # of model.weights src/models/weights.py does it
        if path := getattr(config.data, name):
            setattr(config.data, name, at_home(path))
    config.runs_dir = at_home(config.runs_dir)
    _check_choices(config, "")
    _check_ranges(config)
    _check_names(config)
    check_rules(config)
    _check_data(config.data, files)
    _check_together(config)
    check_strategy(config)
    return config


def as_text(value: Any) -> Any:
    """Plain values for OmegaConf, to which a ${ in a resolved text would be an interpolation once more."""
    if isinstance(value, dict):
        return {key: as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_text(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


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
                fix=corrected(f"{name}={option_like(name, str(value), options) or options[0]}"),
            )


def _check_ranges(config: Config) -> None:
    """Numbers that cannot be meant, each with the range that can."""
    for name, (lowest, highest, _) in RANGES.items():
        number = attrgetter(name)(config)
        if number is not None and not lowest <= number <= highest:
            allowed = f"at least {lowest}" if highest == ANY and number < lowest else f"from {lowest} to {highest}"
            raise out_of_range(name, number, allowed)
    data, trainer = config.data, config.trainer
    if data.batch_size != "auto" and not (type(data.batch_size) is int and 1 <= data.batch_size <= 10**6):
        raise out_of_range("data.batch_size", data.batch_size, "a whole number from 1, or auto, and at most 1000000")
    if trainer.max_time is not None and not re.fullmatch(r"\d{1,5}:\d\d:\d\d:\d\d", trainer.max_time):
        raise out_of_range("trainer.max_time", trainer.max_time, "DD:HH:MM:SS: days, hours, minutes, seconds")
    if trainer.max_steps != -1 and not 1 <= trainer.max_steps <= ANY:
        raise out_of_range("trainer.max_steps", trainer.max_steps, f"at least 1 and at most {ANY}, or -1 for no limit")
    if len(data.background) != 3 or not all(0 <= level <= 255 for level in data.background):
        raise out_of_range("data.background", data.background, "three levels from 0 to 255")


def out_of_range(name: str, value: Any, allowed: str) -> UserError:
    """The error for a number that cannot be meant."""
    return UserError(
        f"{name}={value} is out of range", why=f"{name} is {allowed}", fix=corrected(f"{name}={EXAMPLES[name]}")
    )


def _check_names(config: Config) -> None:
    """A variable of the shell that is not set leaves an empty text, which Python takes for the folder at hand."""
    for key, example in EXAMPLE_TEXTS.items():
        if attrgetter(key)(config) == "":
            raise UserError(
                f"{key}= has no value",
                why="a variable of the shell that is not set leaves nothing behind the =; the folder at hand is .",
                fix=corrected(f"{key}={example}"),
            )
    if config.name is not None:
        check_name(config.name, config.runs_dir)


def _check_data(data: Data, files: bool) -> None:
    """Each source needs its own settings, and what they name has to be there."""
    needs = {"image_folder": "root", "table": "table", "torchvision": "name"}
    needed = needs.get(data.source)
    if needed and getattr(data, needed) is None:
        raise UserError(
            f"data.{needed} is missing",
            why=f"data={data.source} needs to know where the images are",
            fix=corrected(f"data.{needed}={EXAMPLE_TEXTS[f'data.{needed}']}"),
        )
    for name in ("table", "split_file", "root"):
        path = getattr(data, name)
        if files and path is not None and data.source != "torchvision" and not Path(path).exists():
            raise _missing(name, path)
    if data.val_fraction + data.test_fraction > 0.9:
        raise UserError(
            f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave too little to train on",
            why="together they may be at most 0.9",
            fix=corrected("data.val_fraction=0.15", "data.test_fraction=0.15"),
        )


def _missing(name: str, path: str) -> UserError:
    return UserError(
        f"data.{name}={path} does not exist",
        where=str(Path(path).absolute()),
        why="relative paths start from the folder the command is run in",
        fix=f"ls {shell_word(existing_parent(Path(path)))}",
        code=ExitCode.NO_INPUT,
    )


def _check_together(config: Config) -> None:
    """Settings that contradict each other."""
    optimizer = config.optimizer
    if (optimizer.name == "sgd") != (optimizer.momentum is not None):
        raise UserError(
            f"optimizer.momentum={optimizer.momentum} does not go with optimizer={optimizer.name}",
            why="sgd needs a momentum, adamw has none of that name",
            fix=corrected(
                "optimizer=sgd", f"optimizer.momentum={optimizer.momentum or 0.9}", remove=["optimizer.name"]
            ),
        )
    if optimizer.schedule == "onecycle" and optimizer.warmup_fraction == 0:
        raise UserError(
            "optimizer.warmup_fraction=0 does not go with optimizer.schedule=onecycle",
            why="one cycle is a rise and a fall: the rise needs steps",
            fix=corrected("optimizer.warmup_fraction=0.3"),
        )
    if config.checkpoint.monitor not in METRICS:
        raise UserError(
            f"checkpoint.monitor={config.checkpoint.monitor} is not a metric that is reported",
            why=f"reported are: {', '.join(METRICS)}",
            fix=corrected(
                f"checkpoint.monitor={option_like('', config.checkpoint.monitor, tuple(METRICS)) or 'val/acc'}"
            ),
        )
    checkpoint = config.checkpoint
    if checkpoint.select == "average_top_k" and checkpoint.top_k == 1:
        raise UserError(
            "checkpoint.select=average_top_k does not go with checkpoint.top_k=1",
            why="an average needs the weights of two epochs at least",
            fix=corrected("checkpoint.top_k=3"),
        )
    phases = config.freeze.phases
    if phases is not None and not (
        isinstance(phases, dict)
        and all(type(epoch) is int and epoch >= 0 for epoch in phases)
        and all(isinstance(blocks, list) and blocks for blocks in phases.values())
    ):
        raise UserError(
            f"freeze.phases={phases} is not a schedule",
            why="it says from which epoch on which blocks are trained: {epoch: [block, ...], ...}",
            fix=corrected(f"freeze.phases={EXAMPLES['freeze.phases']}"),
        )
    if phases is not None and 0 not in phases:
        raise UserError(
            f"freeze.phases={config.freeze.phases} says nothing of epoch 0",
            why="the first phase says what is trained from the start; with nothing to train there is no gradient",
            fix=corrected(f"freeze.phases={EXAMPLES['freeze.phases']}"),
        )
