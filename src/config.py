"""The knobs: one line each, with its type, its default, its range or choices, and what it does.

choice(option, ..., default=...), number(default, lowest, highest, example), value(default, example):
src/engine/commands/knobs.py. The example is for the commands that messages suggest. conf/ holds the values. Hydra
composes the YAML files onto `Config`, which refuses unknown keys and values of another type;
src/engine/commands/config_checks.py refuses what is out of range or no choice, and src/rules.py settings that
contradict each other, all of it before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from src import features  # noqa: F401 (its rooms add strategies)
from src.engine.commands import schema
from src.engine.commands.knobs import ANY, arguments, choice, number, value
from src.engine.features import strategies

# Task -> its metrics beside loss; what they are: src/tasks/.
METRICS_OF = {"multiclass": ("acc", "balanced_acc", "macro_f1"), "binary": ("acc", "balanced_acc", "macro_f1")}
METRICS_OF["regression"] = ("r2", "mae", "rmse")
METRICS_OF["multilabel"] = ("macro_f1", "map", "subset_acc")
LESS_IS_BETTER = ("loss", "mae", "rmse")
NAMES = [*dict.fromkeys(name for names in METRICS_OF.values() for name in names), "loss"]
METRICS: dict[str, Literal["max", "min"]]
METRICS = {f"val/{name}": "min" if name in LESS_IS_BETTER else "max" for name in NAMES}


@dataclass(kw_only=True)
class Task:
    name: str = choice(*METRICS_OF, default="multiclass", own="src.my_tasks.Mine")  # set by task=NAME: src/tasks/
    options: dict[str, Any] = arguments()  # arguments of your own task
    positive: str | None = value(None, "cats")  # of binary: the class that is called positive; null: the second
    threshold: float | None = number(
        None, 0.0, 1.0, 0.5
    )  # from this probability on it is positive; null: the task's own


@dataclass(kw_only=True)
class Data:
    source: str = choice(  # set by data=NAME; data=own reads your own source
        "digits", "image_folder", "table", "torchvision", "synthetic", own="src.my_data.from_sqlite"
    )
    options: dict[str, Any] = arguments()  # arguments of your own source
    root: str | None = value(None, "photos/")  # folder of the images; of torchvision sets: the download folder
    table: str | None = value(None, "labels.csv")  # CSV file with columns path,label and optionally split (data=table)
    label_columns: list[str] = value([], "[age,weight]")  # columns of the table with the label; none: label
    name: str | None = value(None, "CIFAR10")  # which torchvision set (data=torchvision)
    layout: str = choice("auto", "classes", "splits", default="auto")  # what root's folders are: docs/data.md
    split_file: str | None = value(None, "runs/first/split.csv")  # reuse the split of an earlier run
    group: str | None = value(None, "patient")  # a table's column, or a regular expression that finds it in each path
    split_seed: int | None = number(None, 0, 2**63 - 1, 0)  # of the split alone; null: seed
    folds: int | None = number(
        None, 2, 1000, 5
    )  # cross-validation: as many runs, each with another part of the images as test
    fold: int | None = number(None, 0, 999, 0)  # the one fold to train, from 0; null: all of them
    val_fraction: float = number(0.15, 0.01, 0.9)  # share of each class held out for choosing the best epoch
    test_fraction: float = number(0.15, 0.0, 0.9)  # share of each class held out for the final numbers
    num_images: int | None = number(None, 1, 10**7, 240)  # how many images to draw (data=synthetic)
    num_classes: int | None = number(None, 2, 10**5, 3)  # how many classes to draw (data=synthetic)
    image_size: int | None = number(None, 16, 4096, 224)  # side of the model's input in pixels; null: the weights' own
    crop_ratio: float | None = number(None, 0.1, 1.0, 1.0)  # share a centre crop keeps; null: the weights' own
    augment: str = choice("none", "light", "standard", "strong", default="standard", own="src.my_transforms.build")
    background: list[int] = value([255, 255, 255], "[255,255,255]")  # RGB behind transparent images
    keep_side: int | None = number(None, 0, 10**5, 1024)  # halve large images down to this side; null: fits; 0: never
    max_megapixels: float = number(100.0, 0.001, 10_000)  # larger images are refused before they are decoded
    bits: int | None = number(None, 1, 16, 12)  # bits used by 16-bit channels; null: the most that the check finds
    on_bad_image: str = choice("error", "skip", default="error")  # stop with a list of them, or train without them
    class_weights: str = choice("none", "balanced", "inverse", default="none")  # weights in the loss: docs/uneven.md
    sampler: str = choice("shuffle", "balanced", default="shuffle")  # each image once, or each class equally often
    mix: str = choice("none", "mixup", "cutmix", default="none")  # images that show two: docs/data.md
    mix_alpha: float | None = number(None, 0.01, 100.0, 0.4)  # how evenly two share an image; null: 0.2, of cutmix 1
    image_bank: str = choice("auto", "off", default="auto")  # keep decoded images in runs_dir/.images: docs/data.md
    cache_mib: float = number(4096.0, 1, 10**9)  # how much runs_dir/.images may take; what is too much is decoded anew
    batch_size: Any = value(32, 32)  # images per optimizer step, over all devices
    num_workers: int | None = number(None, 0, 256, 2)  # loader processes of all devices; null: one per core
    timeout_seconds: float = number(300.0, 0, 10**6)  # end the run if an image takes longer to load; 0: no limit


@dataclass(kw_only=True)
class Model:
    backbone: str = value(MISSING, "resnet18", own="src.my_nets.tiny")  # efficientnet_lite0, torchvision's, timm/NAME
    backbone_options: dict[str, Any] = arguments()  # arguments of your own backbone
    weights: str = value("default", "default")  # default (pretrained), none (random), or the path of a file or a run
    min_match: float = number(0.9, 0.0, 1.0)  # refuse a weights file that fits a smaller share of the backbone
    head: str = choice("linear", "mlp", "append", default="linear", own="src.my_heads.cosine")  # src/models/heads.py
    head_options: dict[str, Any] = arguments()  # arguments of your own head
    loss: str = choice(
        "cross_entropy", "focal", "logit_adjusted", "mse", "huber", default="cross_entropy", own="src.my_losses.focal"
    )
    loss_options: dict[str, Any] = arguments()  # of focal: gamma; of logit_adjusted: tau; or those of your own loss
    module: str = choice("classifier", default="classifier", own="src.my_module.Mixup")  # src/models/classifier.py
    module_options: dict[str, Any] = arguments()  # arguments of your own LightningModule
    hidden: int = number(512, 1, 10**5)  # width of the hidden layer (head=mlp)
    dropout: float = number(0.0, 0.0, 0.95, 0.2)  # before the head's last layer
    num_classes: int | None = number(None, 1, 10**5, "null")  # null: the data's; another number than theirs is refused
    label_smoothing: float = number(0.1, 0.0, 0.9)  # share of the target spread evenly over the classes in training
    # divide the logits by a number chosen on val, so that probabilities are as often right as they say
    calibrate: str = choice("none", "temperature", default="none")
    channels_last: bool = True  # memory layout; faster on CPUs and on GPUs with tensor cores
    split_at: Any = value(None, "[layer2]")  # cut resnet50 after these; auto, auto_memory: measured (room: pipeline)


@dataclass(kw_only=True)
class Optimizer:
    name: str = choice("adamw", "sgd", own="src.my_optim.lion")  # set by optimizer=NAME
    options: dict[str, Any] = arguments()  # arguments of your own optimizer
    lr: float = number(MISSING, 1e-12, 100.0, 0.001)  # learning rate of the head, for the whole (global) batch
    backbone_lr_scale: float | None = number(None, 0.0, 100.0, 0.1)  # the backbone's lr is lr times this; null: fits
    weight_decay: float = number(0.01, 0.0, 10.0)  # of layers' weights, not of biases, norms, tokens and positions
    momentum: float | None = number(None, 0.0, 0.9999, 0.9)  # of sgd
    schedule: str = choice(  # how lr changes over time
        "cosine", "onecycle", "plateau", "constant", default="cosine", own="src.my_optim.halving"
    )
    schedule_options: dict[str, Any] = arguments()  # arguments of your own schedule
    warmup_fraction: float = number(0.05, 0.0, 0.9)  # share of the steps in which lr rises to its value


@dataclass(kw_only=True)
class Freeze:
    preset: str = choice("head_only", "last_n", "gradual", "full", default="last_n")  # docs/freezing.md
    lr_decay: float | None = number(None, 0.01, 1.0, 0.8)  # factor on lr per block below the head; null: 1
    unfreeze_epoch: int = number(1, 0, 10**6, 2)  # epoch in which last_n and gradual begin to unfreeze the backbone
    last_n: int = number(12, 1, ANY)  # how many blocks, counted from the head, last_n and gradual unfreeze
    lora_rank: int = number(0, 0, 1024, 8)  # of adapters that learn beside a frozen attention; 0: none (docs/memory.md)
    phases: Any = value(None, "{0:[head],2:[all]}")  # {first epoch: [trained blocks]}; replaces preset
    batchnorm: str = choice("keep", "update", default="update")  # keep pretrained statistics, or adapt trained blocks'
    batchnorm_momentum: float = number(0.1, 0.0001, 1.0)  # share of a new batch in the updated statistics


@dataclass(kw_only=True)
class FeatureBank:
    # augmented views of an image that epochs cycle through while only the head learns; null: 8; 0: no bank
    views: int | None = number(None, 0, 1000, 8)
    limit_gib: float = number(10.0, 0.0, 10**6)  # how much runs_dir/.features may take; the oldest go first


@dataclass(kw_only=True)
class Checkpoint:
    monitor: str = choice(*METRICS, default="val/acc")  # the metric that chooses the best epoch
    select: str = choice("best", "last", "average_top_k", "ema", "greedy_soup", default="best")  # the weights of model/
    top_k: int | None = number(None, 1, ANY, 3)  # keep this many best epochs' weights; null: 1, or 3 to average them
    ema_decay: float | None = number(None, 0.0, 0.99999, 0.99)  # share of the average a step keeps; null: 0.99
    every_n_steps: int | None = number(None, 1, ANY, 100)  # save the position every n steps too; null: per epoch
    every_n_minutes: float | None = number(None, 0.01, 10_000, 10)  # save the position every n minutes too
    background: bool = True  # write while training goes on; false: the step waits for the disk


@dataclass(kw_only=True)
class Memory:
    log: bool = True  # memory.csv, a row per step, and each epoch's numbers in metrics.csv
    detect_growth: bool = True  # warn if every step keeps memory (room: memory_growth)
    checkpoint_gradients: bool = False  # keep only what goes into a block, and compute it again for the backward pass
    history: bool = False  # on a GPU: record every allocation's origin, for the snapshot saved on out-of-memory


@dataclass(kw_only=True)  # room: reports
class Report:  # room: reports
    page: bool = True  # write report.html; python -m src.report makes it later, too (room: reports)
    explain: bool = False  # Grad-CAM: show in report.html what the network looked at in its mistakes (room: reports)


@dataclass(kw_only=True)
class Oom:
    policy: str = choice("split", "stop", default="split")  # out of memory: repeat the batch in parts, or stop
    grow_after: int = number(200, 1, ANY)  # clean steps after which larger parts are tried again


@dataclass(kw_only=True)
class Trainer:
    accelerator: str = choice("auto", "cpu", "gpu", "mps", default="auto")  # auto: a GPU if there is one
    devices: Any = value(1, 1)  # devices on each machine: a number, a list such as [0,2], or auto: all GPUs
    num_nodes: int = number(1, 1, 10**5)  # how many machines
    max_epochs: Any = value("auto", 20)  # passes over the training images; auto: 12, more where they are few
    max_steps: int = value(-1, 100)  # stop after this many optimizer steps; -1: no limit
    max_time: str | None = value(None, "00:01:30:00")  # stop after DD:HH:MM:SS
    patience: int | None = number(None, 1, ANY, 5)  # stop after this many epochs without a better checkpoint.monitor
    min_delta: float = number(0.0, 0.0, 1e6, 0.001)  # what a better one gains at least, for trainer.patience
    limit_batches: int | None = number(None, 1, ANY, 10)  # use only this many batches of each split; null: all
    gradient_clip: float | None = number(None, 1e-6, 1e6, 1.0)  # largest norm of the gradient; null: not clipped
    on_nan: str = choice("stop", "skip", "restore", default="stop")  # if a loss or gradient is nan: docs/errors.md
    compile: bool = False  # torch.compile for the backbone's training steps (docs/performance.md)
    threads: int | None = number(None, 1, 1024, 2)  # CPU threads of the job; null: all cores, or OMP_NUM_THREADS


@dataclass(kw_only=True)
class Strategy:
    name: str = choice("single", "ddp", *strategies(), own="src.my_strategies.fewer_messages")  # set by strategy=NAME
    options: dict[str, Any] = arguments()  # arguments of your own strategy
    timeout_seconds: float | None = number(None, 1, 10**6, 120)  # wait this long for the run's other processes
    sync_batchnorm: bool = False  # BatchNorm statistics of the whole batch, not of a process's share (ddp on GPUs)
    micro_batches: int | None = number(None, 1, 10**6, 4)  # parts of a batch in flight (room: pipeline)
    schedule: str | None = choice("1f1b", "gpipe", default=None)  # order of micro-batches (room: pipeline)


@dataclass(kw_only=True)
class Precision:
    name: str = choice("fp32", "fp16", "bf16", "auto")  # set by precision=NAME


@dataclass(kw_only=True)
class Callbacks:
    extra: list[Any] = value([], "[{_target_:src.callbacks.mine.MyCallback}]")  # your own; only names below src.


@dataclass(kw_only=True)
class Logger:
    tensorboard: bool = True  # event files in runs/NAME/tensorboard
    wandb: bool = False  # Weights & Biases, needs pip install -e ".[wandb]"
    mlflow: bool = False  # MLflow, needs pip install -e ".[mlflow]"
    project: str = "image-transfer-learning"  # the project (wandb) or experiment (mlflow) to log under
    tracking_uri: str | None = None  # where mlflow keeps its runs; null: an sqlite file beside the runs
    extra: list[Any] = value([], "[{_target_:src.my_loggers.JsonLines}]")  # your own; only names below src.
    offline: bool = False  # keep wandb's files here, to be sent later with `wandb sync`


@dataclass(kw_only=True)
class Config:
    name: str | None = value(None, "first")  # the run's folder is runs_dir/name; null: date, time, random letters
    seed: int = number(0, 0, 2**63 - 1)  # of everything: split, order, augmentation, dropout, new layers
    debug: bool = False  # three quick steps of everything
    resume: str = choice("auto", "never", default="auto")  # auto: continue the run of this name; never: refuse it
    runs_dir: str = value("runs", "runs")  # where run folders are made
    # a linear model on the features of the untouched backbone. show: measured beside the run; keep: it is what the run ends
    # with, if no epoch is as good on val; only: no training
    baseline: str = choice("none", "show", "keep", "only", default="show")
    metrics: list[Any] = value(
        [], "[src.my_metrics.Kappa]"
    )  # your own: each is measured, and can be checkpoint.monitor
    task: Task = field(default_factory=Task)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    strategy: Strategy = field(default_factory=Strategy)
    precision: Precision = field(default_factory=Precision)
    trainer: Trainer = field(default_factory=Trainer)
    freeze: Freeze = field(default_factory=Freeze)
    feature_bank: FeatureBank = field(default_factory=FeatureBank)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    memory: Memory = field(default_factory=Memory)
    report: Report = field(default_factory=Report)  # room: reports
    oom: Oom = field(default_factory=Oom)
    callbacks: Callbacks = field(default_factory=Callbacks)
    logger: Logger = field(default_factory=Logger)


schema.register(Config, METRICS)
