"""What can be chosen: one line and one comment per knob, their types, and the checks that need no torch.

conf/ holds the values, this file what they may be. Hydra composes the YAML files onto `Config`, so that an unknown key or
a wrong type is refused by itself; `read` turns the result into plain dataclasses and refuses values that are no choice and
settings that contradict each other. Everything here runs before torch is imported.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from src.errors import ExitCode, UserError

log = logging.getLogger(__name__)

# What a validation reports, and whether more of it is better.
METRICS = {"val/acc": "max", "val/balanced_acc": "max", "val/macro_f1": "max", "val/loss": "min"}


def choice(*options: str, default: str = MISSING) -> Any:
    """A text field that takes one of the options."""
    return field(default=default, metadata={"options": options})


@dataclass(kw_only=True)
class Data:
    source: str = choice("digits", "image_folder", "table", "torchvision", "synthetic")  # chosen by data=NAME
    root: str | None = None  # folder of the pictures; for torchvision sets, where to download to
    table: str | None = None  # CSV file with the columns path,label and optionally split (data=table)
    name: str | None = None  # which torchvision set, e.g. CIFAR10 (data=torchvision)
    split_file: str | None = None  # a split.csv of an earlier run, to split in the same way
    val_fraction: float = 0.15  # share of each class held out for choosing the best epoch
    test_fraction: float = 0.15  # share of each class held out for the final numbers
    num_pictures: int | None = None  # how many pictures to make (data=synthetic)
    num_classes: int | None = None  # how many classes to make (data=synthetic)
    image_size: int | None = (
        None  # side of the square the model sees, in pixels; null: what the weights were trained on
    )
    crop_ratio: float | None = None  # share of the shorter side that a centre crop keeps; null: the weights' own
    augment: str = choice("none", "light", "standard", "strong", default="standard")  # see src/data/transforms.py
    background: list[int] = field(default_factory=lambda: [255, 255, 255])  # RGB behind transparent pictures
    max_megapixels: float = 100.0  # larger pictures are refused by their header, before any memory is spent
    on_bad_image: str = choice("error", "skip", default="error")  # stop with a list of them, or train without them
    class_weights: str = choice("none", "balanced", default="none")  # balanced: rare classes count more in the loss
    batch_size: int = 32  # pictures per optimizer step, over all devices
    num_workers: int | None = None  # loader processes, over all devices; null: one per core, 0 for pictures in memory


@dataclass(kw_only=True)
class Model:
    backbone: str = MISSING  # efficientnet_lite0, a torchvision model's name, or timm/NAME
    weights: str = "default"  # default (pretrained), none (random), or a path to .pth, .safetensors or a run's model/
    min_match: float = 0.9  # a weights file that fits fewer of the backbone's tensors than this share is refused
    head: str = choice("linear", "mlp", "append", default="linear")  # see src/models/heads.py
    hidden: int = 512  # width of the hidden layer (head=mlp)
    dropout: float = 0.0  # before the head's last layer
    task: str = choice("multiclass", "binary", default="multiclass")  # binary: two classes, one logit
    num_classes: int | None = None  # null: as many as the data has; a number that differs from the data is refused
    label_smoothing: float = 0.1  # share of the target spread evenly over the classes, while training
    channels_last: bool = True  # memory layout; faster on CPUs and on GPUs with tensor cores


@dataclass(kw_only=True)
class Optimizer:
    name: str = choice("adamw", "sgd")  # chosen by optimizer=NAME
    lr: float = MISSING  # learning rate of the head, for the whole (global) batch
    backbone_lr_scale: float = 0.5  # the backbone learns with lr times this
    weight_decay: float = 0.01  # of weights; biases and norm layers are not decayed
    momentum: float | None = None  # of sgd
    schedule: str = choice("cosine", "onecycle", "constant", default="cosine")  # how lr changes over the steps
    warmup_fraction: float = 0.05  # share of the steps in which lr rises from 0 (cosine and constant)


@dataclass(kw_only=True)
class Freeze:
    preset: str = choice("head_only", "last_n", "gradual", "full", default="last_n")  # see src/callbacks/freezing.py
    unfreeze_epoch: int = 1  # epoch in which last_n and gradual begin to unfreeze the backbone
    last_n: int = 12  # how many blocks, counted from the head, last_n and gradual unfreeze
    phases: Any = None  # {0: [head], 3: [layer4]}: blocks trained from an epoch on; replaces preset
    batchnorm: str = choice(
        "keep", "update", default="update"
    )  # statistics of trained blocks: pretrained, or of your pictures
    batchnorm_momentum: float = 0.1  # share of a new batch in the updated statistics


@dataclass(kw_only=True)
class Checkpoint:
    monitor: str = "val/acc"  # the metric that chooses the best epoch
    every_n_steps: int | None = None  # also save the position every n steps; null: at the end of every epoch only


@dataclass(kw_only=True)
class Trainer:
    accelerator: str = choice("auto", "cpu", "gpu", "mps", default="auto")  # auto: a GPU where there is one
    devices: Any = 1  # how many devices on each machine
    num_nodes: int = 1  # how many machines
    max_epochs: int = 10  # passes over the training pictures
    max_steps: int = -1  # optimizer steps after which to stop; -1: no limit
    max_time: str | None = None  # DD:HH:MM:SS after which to stop; null: no limit
    limit_batches: int | None = None  # use only so many batches of each split per epoch; null: all
    gradient_clip: float | None = None  # largest norm of the gradient; null: not clipped
    threads: int | None = None  # CPU threads of the whole job; null: all cores


@dataclass(kw_only=True)
class Strategy:
    name: str = choice("single")  # chosen by strategy=NAME


@dataclass(kw_only=True)
class Precision:
    name: str = choice("fp32", "fp16", "bf16")  # chosen by precision=NAME


@dataclass(kw_only=True)
class Callbacks:
    extra: list[Any] = field(default_factory=list)  # your own: [{_target_: src.callbacks.mine.MyCallback, ...}]


@dataclass(kw_only=True)
class Logger:
    tensorboard: bool = True  # event files in runs/NAME/tensorboard
    wandb: bool = False  # Weights & Biases, needs pip install -e ".[wandb]"
    mlflow: bool = False  # MLflow, needs pip install -e ".[mlflow]"
    project: str = "image-transfer-learning"  # the project (wandb) or experiment (mlflow) to log under
    tracking_uri: str | None = None  # where mlflow keeps its runs; null: sqlite file beside the runs
    offline: bool = False  # keep wandb's files here, to be sent later with `wandb sync`


@dataclass(kw_only=True)
class Config:
    name: str | None = None  # the run's folder is runs_dir/name; null: date, time and a few random letters
    seed: int = 0  # of everything: split, order, augmentation, dropout, new layers
    debug: bool = False  # three quick steps of everything
    resume: str = choice("auto", "never", default="auto")  # auto: a run of this name continues; never: it is refused
    runs_dir: str = "runs"  # where run folders are made
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    strategy: Strategy = field(default_factory=Strategy)
    precision: Precision = field(default_factory=Precision)
    trainer: Trainer = field(default_factory=Trainer)
    freeze: Freeze = field(default_factory=Freeze)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    callbacks: Callbacks = field(default_factory=Callbacks)
    logger: Logger = field(default_factory=Logger)


def register() -> None:
    """Makes the schema known to Hydra; conf/train.yaml begins with it."""
    ConfigStore.instance().store(name="schema", node=Config)


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
    return config


def quick(config: Config) -> Config:
    """debug=true: three steps of every phase, one epoch each, so that a mistake anywhere shows in seconds."""
    phases = config.freeze.phases
    starts = sorted(phases) if phases else ([0] if config.freeze.preset in ("head_only", "full") else [0, 1])
    return replace(
        config,
        trainer=replace(config.trainer, max_epochs=len(starts), limit_batches=3),
        freeze=replace(
            config.freeze,
            unfreeze_epoch=min(1, config.freeze.unfreeze_epoch),
            phases={epoch: phases[start] for epoch, start in enumerate(starts)} if phases else None,
        ),
    )


def plain(config: Config) -> dict[str, Any]:
    """The config as nested dicts of plain values: what config.yaml and checkpoints hold."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)  # type: ignore[return-value]


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every key a command line can set, such as data.batch_size; for suggesting the right one after a typo."""
    keys = []
    for knob in fields(schema):
        keys.append(prefix + knob.name)
        group = knob.default_factory
        if isinstance(group, type) and is_dataclass(group):
            keys += known_keys(group, f"{prefix}{knob.name}.")
    return keys


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
        "data.batch_size": data.batch_size,
        "model.hidden": model.hidden,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.num_nodes": trainer.num_nodes,
        "trainer.limit_batches": trainer.limit_batches,
        "trainer.threads": trainer.threads,
        "checkpoint.every_n_steps": config.checkpoint.every_n_steps,
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
        ("model.dropout", model.dropout, 0.0, 0.95, 0.2),
        ("model.min_match", model.min_match, 0.0, 1.0, 0.9),
        ("model.label_smoothing", model.label_smoothing, 0.0, 0.9, 0.1),
        ("optimizer.lr", optimizer.lr, 1e-12, 100.0, 0.001),
        ("optimizer.backbone_lr_scale", optimizer.backbone_lr_scale, 0.0, 100.0, 0.1),
        ("optimizer.weight_decay", optimizer.weight_decay, 0.0, 10.0, 0.01),
        ("optimizer.warmup_fraction", optimizer.warmup_fraction, 0.0, 0.9, 0.05),
        ("freeze.batchnorm_momentum", config.freeze.batchnorm_momentum, 0.0001, 1.0, 0.1),
        ("freeze.unfreeze_epoch", config.freeze.unfreeze_epoch, 0, 10**6, 2),
        ("seed", config.seed, 0, 2**63, 0),
    ]
    for name, number, lowest, highest, example in ranges:
        if number is not None and not lowest <= number <= highest:
            raise out_of_range(name, number, f"from {lowest} to {highest}", example)
    if trainer.max_steps != -1 and trainer.max_steps < 1:
        raise out_of_range("trainer.max_steps", trainer.max_steps, "at least 1, or -1 for no limit", 100)
    if len(data.background) != 3 or not all(0 <= level <= 255 for level in data.background):
        raise out_of_range("data.background", data.background, "three levels from 0 to 255", "[255,255,255]")


def out_of_range(name: str, value: Any, allowed: str, example: Any) -> UserError:
    """The error for a number that cannot be meant; the example parses as an override."""
    return UserError(
        f"{name}={value} is out of range", why=f"{name} is {allowed}", fix=f"python -m src.train {name}={example}"
    )


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
    }
    for name, sources in used_by.items():
        if getattr(data, name) is not None and data.source not in sources:
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
    model, optimizer, trainer = config.model, config.optimizer, config.trainer
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
    if config.strategy.name == "single" and (trainer.devices != 1 or trainer.num_nodes != 1):
        raise UserError(
            f"strategy=single does not go with trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}",
            why="strategy=single trains on one device of one machine",
            fix="python -m src.train trainer.devices=1 trainer.num_nodes=1",
        )
    if config.checkpoint.monitor not in METRICS:
        raise UserError(
            f"checkpoint.monitor={config.checkpoint.monitor} is not a metric that is reported",
            why=f"reported are: {', '.join(METRICS)}",
            fix="python -m src.train checkpoint.monitor=val/balanced_acc",
        )
    phases = config.freeze.phases
    if phases is not None and not (
        isinstance(phases, dict)
        and all(isinstance(epoch, int) and isinstance(blocks, list) and blocks for epoch, blocks in phases.items())
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
    if model.head == "append" and model.weights == "none":
        log.warning("model.head=append keeps the pretrained classifier, but model.weights=none leaves it random.")
