"""What can be chosen: one line and one comment per knob, and its type.

conf/ holds the values, this file what they may be. Hydra composes the YAML files onto `Config`, so that an unknown key or
a wrong type is refused by itself; src/config_checks.py turns the result into plain dataclasses and
refuses what contradicts itself. All of it runs before torch is imported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

# What a validation reports, and whether more of it is better.
METRICS = {"val/acc": "max", "val/balanced_acc": "max", "val/macro_f1": "max", "val/loss": "min"}


def choice(*options: str, default: str = MISSING) -> Any:
    """A text field that takes one of the options."""
    return field(default=default, metadata={"options": options})


@dataclass(kw_only=True)
class Data:
    source: str = choice("digits", "image_folder", "table", "torchvision", "synthetic")  # chosen by data=NAME
    root: str | None = None  # folder of the images; for torchvision sets, where to download to
    table: str | None = None  # CSV file with the columns path,label and optionally split (data=table)
    name: str | None = None  # which torchvision set, e.g. CIFAR10 (data=torchvision)
    layout: str = choice("auto", "classes", "splits", default="auto")  # what root's folders are: src/data/layout.py
    split_file: str | None = None  # a split.csv of an earlier run, to split in the same way
    val_fraction: float = 0.15  # share of each class held out for choosing the best epoch
    test_fraction: float = 0.15  # share of each class held out for the final numbers
    num_images: int | None = None  # how many images to make (data=synthetic)
    num_classes: int | None = None  # how many classes to make (data=synthetic)
    image_size: int | None = (
        None  # side of the square the model sees, in pixels; null: what the weights were trained on
    )
    crop_ratio: float | None = None  # share of the shorter side that a centre crop keeps; null: the weights' own
    augment: str = choice("none", "light", "standard", "strong", default="standard")  # see src/data/transforms.py
    background: list[int] = field(default_factory=lambda: [255, 255, 255])  # RGB behind transparent images
    max_megapixels: float = 100.0  # larger images are refused by their header, before any memory is spent
    bits: int | None = None  # how many bits the images' 16-bit channels use; null: as many as the check finds
    on_bad_image: str = choice("error", "skip", default="error")  # stop with a list of them, or train without them
    class_weights: str = choice(
        "none", "balanced", "inverse", default="none"
    )  # an image of a rare class counts more in the loss: as 1 / images of its class, in balanced at most 10-fold
    batch_size: Any = 32  # images per optimizer step, over all devices; auto: the largest that fits
    num_workers: int | None = None  # loader processes, over all devices; null: one per core, 0 for images in memory
    timeout_seconds: float = 300.0  # an image that takes longer to load ends the run, named; 0: no limit


@dataclass(kw_only=True)
class Model:
    backbone: str = MISSING  # efficientnet_lite0, a torchvision model's name, or timm/NAME
    weights: str = "default"  # default (pretrained), none (random), or a path to .pth, .safetensors or a run
    min_match: float = 0.9  # a weights file that fits fewer of the backbone's tensors than this share is refused
    head: str = choice("linear", "mlp", "append", default="linear")  # see src/models/heads.py
    hidden: int = 512  # width of the hidden layer (head=mlp)
    dropout: float = 0.0  # before the head's last layer
    task: str = choice("multiclass", "binary", default="multiclass")  # binary: two classes, one logit
    num_classes: int | None = None  # null: as many as the data has; a number that differs from the data is refused
    label_smoothing: float = 0.1  # share of the target spread evenly over the classes, while training
    channels_last: bool = True  # memory layout; faster on CPUs and on GPUs with tensor cores
    split_at: Any = None  # of resnet50: layers after which it is cut into stages; auto, auto_memory: measured


@dataclass(kw_only=True)
class Optimizer:
    name: str = choice("adamw", "sgd")  # chosen by optimizer=NAME
    lr: float = MISSING  # learning rate of the head, for the whole (global) batch
    backbone_lr_scale: float = 0.3  # the backbone learns with lr times this
    weight_decay: float = 0.01  # of layers' weights; biases, norms, tokens and position embeddings are not decayed
    momentum: float | None = None  # of sgd
    schedule: str = choice("cosine", "onecycle", "plateau", "constant", default="cosine")  # how lr changes over time
    warmup_fraction: float = 0.05  # share of the steps in which lr rises to its value


@dataclass(kw_only=True)
class Freeze:
    preset: str = choice("head_only", "last_n", "gradual", "full", default="last_n")  # see src/callbacks/freezing.py
    lr_decay: float | None = (
        None  # a block learns with lr times this per block between it and the head; null: all alike
    )
    unfreeze_epoch: int = 1  # epoch in which last_n and gradual begin to unfreeze the backbone
    last_n: int = 12  # how many blocks, counted from the head, last_n and gradual unfreeze
    phases: Any = None  # {0: [head], 3: [layer4]}: blocks trained from an epoch on; replaces preset
    batchnorm: str = choice(
        "keep", "update", default="update"
    )  # statistics of trained blocks: pretrained, or of your images
    batchnorm_momentum: float = 0.1  # share of a new batch in the updated statistics


@dataclass(kw_only=True)
class Checkpoint:
    monitor: str = "val/acc"  # the metric that chooses the best epoch
    select: str = choice(
        "best", "last", "average_top_k", "ema", default="best"
    )  # which weights model/ gets; the averaged ones only if they are better than the best epoch's
    top_k: int | None = None  # how many of the best epochs' weights are kept; null: 1, or 3 for average_top_k
    ema_decay: float | None = None  # share of the average that a step keeps (select=ema); null: 0.99
    every_n_steps: int | None = None  # also save the position every n steps; null: at the end of every epoch only
    every_n_minutes: float | None = None  # also save the position every n minutes
    background: bool = True  # write while training goes on; false: the step waits for the disk


@dataclass(kw_only=True)
class Memory:
    log: bool = True  # memory.csv, a row per step, and the epoch's numbers in metrics.csv
    detect_growth: bool = True  # say so once when every step keeps some memory, and where
    history: bool = False  # on a GPU: record where each allocation came from, for the snapshot saved on out-of-memory


@dataclass(kw_only=True)
class Oom:
    policy: str = choice("split", "stop", default="split")  # out of memory: repeat the batch in parts, or stop
    grow_after: int = 200  # clean steps after which larger parts are tried again


@dataclass(kw_only=True)
class Trainer:
    accelerator: str = choice("auto", "cpu", "gpu", "mps", default="auto")  # auto: a GPU where there is one
    devices: Any = 1  # how many devices on each machine, a list of them such as [0,2], or auto: all GPUs
    num_nodes: int = 1  # how many machines
    max_epochs: int = 10  # passes over the training images
    max_steps: int = -1  # optimizer steps after which to stop; -1: no limit
    max_time: str | None = None  # DD:HH:MM:SS after which to stop; null: no limit
    limit_batches: int | None = None  # use only so many batches of each split per epoch; null: all
    gradient_clip: float | None = None  # largest norm of the gradient; null: not clipped
    on_nan: str = choice(
        "stop", "skip", "restore", default="stop"
    )  # a loss or gradient of nan or inf: end the run, leave
    # the step out, or go back to the last epoch's weights with a tenth of the lr
    threads: int | None = None  # CPU threads of the whole job; null: all cores, or OMP_NUM_THREADS


@dataclass(kw_only=True)
class Strategy:
    name: str = choice("single", "dp", "ddp", "model_parallel", "pipeline")  # chosen by strategy=NAME
    timeout_seconds: float | None = None  # of ddp and pipeline: how long a process waits for the others
    sync_batchnorm: bool = False  # of ddp, on GPUs: BatchNorm statistics of the whole batch, not of a process's share
    micro_batches: int | None = None  # of model_parallel and pipeline: parts of a batch that are under way at once
    schedule: str | None = None  # of model_parallel and pipeline: 1f1b or gpipe, the order of the parts in a stage


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
    memory: Memory = field(default_factory=Memory)
    oom: Oom = field(default_factory=Oom)
    callbacks: Callbacks = field(default_factory=Callbacks)
    logger: Logger = field(default_factory=Logger)


def register() -> None:
    """Makes the schema known to Hydra; conf/train.yaml begins with it."""
    ConfigStore.instance().store(name="schema", node=Config)


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
    return asdict(config)


def device_count(trainer: Trainer) -> int:
    """How many devices a machine uses: trainer.devices as a number."""
    if trainer.devices == "auto":
        import torch  # takes seconds

        return max(1, torch.cuda.device_count()) if trainer.accelerator in ("auto", "gpu") else 1
    return len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every key a command line can set, such as data.batch_size; for suggesting the right one after a typo."""
    keys = []
    for knob in fields(schema):
        keys.append(prefix + knob.name)
        group = knob.default_factory
        if isinstance(group, type) and is_dataclass(group):
            keys += known_keys(group, f"{prefix}{knob.name}.")
    return keys
