"""The lines that a run prints before its first step, and model_summary.txt: the model's layers and tensors."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

import torch
import torchinfo
from torch.optim import Optimizer

from src.engine.commands.schema import Config
from src.engine.images.labelled_images import LabelledImages
from src.engine.runs.epochs import FEWEST_EPOCHS, typed_epochs
from src.engine.runs.files import write_text
from src.engine.runs.job import Job
from src.engine.runs.task import RunTask
from src.engine.runs.text import printable
from src.engine.steps.network import Network

log = logging.getLogger(__name__)

FEW = 10  # training images of a class; with fewer, one image more or less moves its accuracy by over 10 points


def introduce(job: Job, task: RunTask, steps: int) -> None:
    """Says what is about to happen, and writes the model's summary. steps: of the whole run."""
    if not job.ranks.is_first:
        return
    config, images = job.config, task.images
    counts = ", ".join(f"{len(members)} {split}" for split, members in images.splits.items())
    summary = write_summary(job.folder.path / "model_summary.txt", task.network, task.preprocessing.image_size)
    log.info(f"run       {printable(job.folder.path)}")
    log.info(f"images    {len(images.names)} {task.kind.counted(images.classes)}: {counts}")
    for line in task.kind.described(images):
        log.info(line)
    if warning := task.kind.warning(images):
        log.warning(warning)
    log.info(f"backbone  {config.model.backbone}: {task.origin}")
    log.info(f"model     {summary}")
    log.info(f"freezing  {task.freezing.described(task.network)}")
    if config.baseline == "only":
        log.info(f"training  none: baseline=only, on {_device_text(job)}, {config.precision.name}")
        log.info("")
        return
    log.info(f"training  {_length(job, task, steps)} on {_device_text(job)}, {config.precision.name}")
    log.info(f"rates     {_rates(task.optimizer(config, task.network), config)}")
    log.info("")


def write_summary(path: Path, network: Network, image_size: int) -> str:
    """Writes torchinfo's table at the real input size and the list of tensors; returns the line for the screen.

    Trainable and frozen are counted as the network stands: in the first epoch.
    """
    info = torchinfo.summary(
        network,
        input_data=torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8),
        col_names=("input_size", "output_size", "num_params", "trainable"),
        depth=4,
        verbose=0,
        row_settings=("var_names",),
    )
    tensors = [
        f"{name:<60} {tuple(tensor.shape)!s:<22} {str(tensor.dtype).removeprefix('torch.'):<10} {tensor.nbytes:>12,} bytes"
        for name, tensor in network.state_dict().items()
    ]
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    write_text(path, f"{info}\n\nstate_dict: {len(tensors)} tensors, {size:,} bytes\n" + "\n".join(tensors) + "\n")
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in network.parameters())
    return (
        f"{_count(total)} parameters, {_count(trained)} trained and {_count(total - trained)} frozen at first, "
        f"images of {image_size}x{image_size}"
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 10**5 else f"{number:,}"


def class_counts(images: LabelledImages) -> str:
    """'cats 120, dogs 80': every class with its number of images; of more than ten the largest and the smallest."""
    of_splits = [images.counts(split) for split in images.splits]
    counts = Counter({name: sum(numbers) for name, *numbers in zip(images.classes, *of_splits, strict=True)})
    shown = [f"{printable(name)} {counts[name]:,}" for name in images.classes]
    if len(shown) <= 10:
        return ", ".join(shown)
    ordered = [f"{printable(name)} {count:,}" for name, count in counts.most_common()]
    return f"largest {', '.join(ordered[:5])}; smallest {', '.join(ordered[-5:])}"


def uneven_classes(images: LabelledImages) -> str:
    """One sentence where some classes have few images beside a large one, else nothing."""
    counts = dict(zip(images.classes, images.counts("train"), strict=True))
    largest = max(counts, key=lambda name: counts[name])
    few = sorted((name for name in counts if counts[name] < FEW), key=lambda name: counts[name])
    if not few or counts[largest] < 10 * counts[few[0]]:
        return ""
    shown = ", ".join(f"{printable(name)} {counts[name]}" for name in few[:3]) + (", ..." if len(few) > 3 else "")
    return (
        f"The classes are uneven: {len(few)} of {len(counts)} have fewer than {FEW} training images ({shown}), "
        f"{printable(largest)} has {counts[largest]:,}; their own numbers are little more than chance, and acc hides them: "
        "look at balanced_acc."
    )


def _length(job: Job, task: RunTask, steps: int) -> str:
    """'12 epochs, 468 steps of 32 images'."""
    config, epochs = job.config, task.freezing.max_epochs
    text = f"{epochs} epochs, {steps} steps of {config.data.batch_size} images"
    if typed_epochs(config) is None and epochs > FEWEST_EPOCHS:
        text += f" ({FEWEST_EPOCHS} epochs would be too few steps: trainer.max_epochs=auto)"
    return text


def _rates(optimizer: Optimizer, config: Config) -> str:
    """'head 0.003, backbone 0.0009 (adamw, cosine)': the largest learning rate of each part, as it is at the top of the
    schedule. Groups of an own optimizer may have no names."""
    rates: dict[str, float] = {}
    for group in reversed(optimizer.param_groups):
        part = re.split(r"[./]", group.get("name", "all"))[0]
        rates[part] = max(group["lr"], rates.get(part, 0.0))
    shown = ", ".join(f"{part} {rate:.2g}" for part, rate in rates.items())
    return f"{shown} ({config.optimizer.name}, {config.optimizer.schedule})"


def _device_text(job: Job) -> str:
    """'cpu with 2 threads' or '2 x cuda (ddp)'."""
    kind, number = job.devices[0].type, torch.get_num_threads()
    if kind == "cpu":
        kind = f"cpu with {number} thread{'s' if number > 1 else ''}"
    count = len(job.devices) * job.config.trainer.num_nodes
    return kind if count == 1 else f"{count} x {kind} ({job.config.strategy.name})"
