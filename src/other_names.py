"""What other programs call the settings of this one, and their values: for the answers to mistyped words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {other: here for here, others in table.items() for other in others.split()}


# A setting of src.train, and its names elsewhere. Where the other programs have settings of their own: OF_PROGRAMS.
NAMES = _by_name(
    {
        "name": "run_name",
        "runs_dir": "output output_dir out save_dir",
        "data": "dataset",
        "data.root": "path data_dir data_path folder images train_dir",
        "data.table": "csv",
        "data.batch_size": "bs b batch",
        "data.image_size": "img_size imgsz size resolution",
        "data.num_workers": "workers j",
        "model.backbone": "arch architecture a model.name",
        "model.weights": "pretrained ckpt_path checkpoint_path",
        "model.label_smoothing": "smoothing",
        "optimizer": "opt",
        "optimizer.lr": "learning_rate",
        "optimizer.weight_decay": "wd",
        "precision": "amp fp16 bf16",
        "checkpoint.monitor": "metric",
        "trainer.accelerator": "device",
        "trainer.devices": "gpus ngpus num_gpus",
        "trainer.num_nodes": "nodes",
        "trainer.max_epochs": "epochs e num_epochs",
        "trainer.max_steps": "steps",
        "trainer.gradient_clip": "clip_grad",
    }
)
OF_PROGRAMS = _by_name(
    {
        "run": "checkpoint ckpt name model",
        "model": "weights",
        "images": "image img imgs input source folder images photos",
        "out": "output csv",
        "accelerator": "device gpu",
        "batch_size": "bs",
        "num_workers": "workers",
        "data.root": "root",
    }
)
# The values of a setting, by the last part of its key.
VALUES = {
    setting: _by_name(table)
    for setting, table in {
        "precision": {
            "fp16": "16 16-mixed fp16-mixed half amp true float16",
            "bf16": "bf16-mixed bfloat16",
            "fp32": "32 32-true float32 false",
        },
        "optimizer": {"adamw": "adam", "sgd": "momentum nesterov"},
        "strategy": {"single": "auto none null", "ddp": "ddp_spawn", "dp": "dataparallel"},
        "logger": {"csv": "none null false", "default": "tensorboard true"},
        "accelerator": {"gpu": "cuda nvidia", "mps": "metal"},
        "devices": {"auto": "all -1"},
        "split": {"train": "training", "val": "validation valid dev", "test": "testing"},
        "augment": {"standard": "true", "none": "false"},
        "class_weights": {"balanced": "true", "none": "false"},
        "weights": {"default": "true imagenet", "none": "false null"},
        "schedule": {"constant": "none null false"},
        "batchnorm": {"keep": "false frozen", "update": "true"},
        "preset": {"head_only": "true", "full": "false none"},
        "policy": {"split": "true", "stop": "false"},
        "resume": {"auto": "true", "never": "false none"},
    }.items()
}


def value_here(key: str, value: str) -> str:
    """What the value is called here, such as gpu for cuda:0; the value itself where no other name of it is known."""
    names, text = VALUES.get(key.rpartition(".")[2], {}), value.lower()
    return names.get(text) or names.get(text.partition(":")[0], value)


def option_like(key: str, value: str, options: Sequence[str]) -> str | None:
    """The option that a value of the setting was probably meant to be; None where nothing is near."""
    here = value_here(key, value)
    close = [here] if here in options else difflib.get_close_matches(value.lower(), options, n=1, cutoff=0.5)
    return close[0] if close else None


def closest(key: str, known: Sequence[str], names: dict[str, str] = NAMES) -> list[str]:
    """The known keys nearest to a mistyped one, the likeliest first. names: what else the keys are called."""
    key = key.replace("-", "_").lower()
    leaf = key.rpartition(".")[2]
    for name in (key, leaf):
        if name not in known and names.get(name) in known:
            return [names[name]]

    def alike(*pair: str) -> float:
        return difflib.SequenceMatcher(None, *(re.sub("[_.]", "", name.lower()) for name in pair)).ratio()

    near = {name: max(alike(key, name), alike(leaf, name.rpartition(".")[2])) for name in known}
    close = [name for name in known if near[name] >= 0.75]
    return sorted(close, key=lambda name: (-near[name], -alike(key, name)))
