"""Measures a model on a split: the numbers that train prints at its end and that evaluate prints again."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected
from src.engine.feature_bank.bank import FeatureBank
from src.engine.feature_bank.loader import split_features
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.loading import eval_loader, loader_settings
from src.engine.runs.bootstrap import metric_intervals
from src.engine.runs.calibration import calibration_errors, fit_temperature
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.job import Job
from src.engine.runs.outputs import Outputs, write_predictions
from src.engine.runs.run_names import free_name
from src.engine.runs.task import RunTask
from src.engine.runs.text import printable
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.metrics import SplitMetrics
from src.engine.steps.task_kind import Loss

log = logging.getLogger(__name__)

DEBUG_BATCHES = 3  # of each split that debug=true measures


class Measured(dict[str, float]):
    """{"val/acc": ..., "test/acc": ...}, and how sure these numbers are."""

    def __init__(self) -> None:
        super().__init__()
        self.intervals: dict[str, tuple[float, float]] = {}  # of the same names: 95 %
        self.intervals_by: str | None = None  # "group" where whole groups were drawn for them
        self.outputs: dict[str, Outputs] = {}  # split -> what they follow from
        self.calibration: dict[str, Any] = {}  # the temperature, and the errors of val and test before and after it


def measure_split(
    model: TrainedModel,
    images: LabelledImages,
    split: str,
    config: Config,
    loss: Loss,
    bank: FeatureBank | None = None,
) -> tuple[dict[str, float], Outputs]:
    """The loss, the metrics of the task and of the owner, of a split, and the outputs that they follow from.

    bank: has the split's features; None: the images are read."""
    members = images.splits[split]
    settings = loader_settings(config.data, images)
    loader = eval_loader(images, split, model.card.preprocessing, settings)
    loss = loss.to(model.device).eval()
    metrics = SplitMetrics(model.kind, model.card.classes, split, config.metrics).to(model.device)
    parts: list[tuple[Tensor, Tensor]] = []
    batches = loader if bank is None else split_features(bank, split)
    for batch, labels in track(batches, "measuring", transient=True, disable=not sys.stdout.isatty()):
        logits, labels = model.logits(batch), labels.to(model.device)
        metrics.update(loss(logits, labels), logits, labels, loss.weight(labels))
        parts.append((logits.cpu(), labels.cpu()))
    if not parts:
        raise UserError(
            "none of the images to measure on can be read any more",
            why="they could be when they were checked; the lines above name them",
            fix="mend the files, then repeat the command",
            code=ExitCode.DATA,
        )
    if bank is None:
        members = [i for i in members if printable(images.location(i)) not in loader.dataset.broken_names]
    else:
        has = bank.table(members).has
        members = [index for index in members if has[index]]
    logits, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    return metrics.compute(), Outputs(logits, labels, members)


def calibrated(job: Job, task: RunTask) -> bool:
    return task.kind.has_probabilities and job.config.model.calibrate == "temperature"


def tune(job: Job, task: RunTask) -> None:
    """Chooses on val what is not learned: the temperature, then what the task needs, such as thresholds."""
    kind, calibrates = task.kind, calibrated(job, task)
    if not (kind.tunes or calibrates):
        return
    _, outputs = measure_split(task.trained(job), task.images, "val", job.config, task.loss(job.config))
    if calibrates:
        kind.values["temperature"] = (fit_temperature(kind, outputs),)
    if kind.tunes:
        kind.tune(outputs.logits / kind.temperature, outputs.labels)


def measure(job: Job, task: RunTask, bank: FeatureBank | None = None) -> Measured:
    """The metrics of the trained network, from the bank where only the head was trained. Writes predictions.csv and the
    task's table of results of test, or of val where there is no test split."""
    model, loss, found = task.trained(job), task.loss(job.config), Measured()
    known, images = bank if bank is not None and bank.is_valid() else None, task.images
    if job.config.debug:
        known, images = None, _few_of(images, DEBUG_BATCHES * job.config.data.batch_size)
    for split in [split for split in ("val", "test") if images.splits[split]]:
        values, outputs = measure_split(model, images, split, job.config, loss, known)
        if split == "val" and not math.isfinite(values["loss"]):
            raise _diverged(job, values["loss"])
        groups = outputs.groups(images)
        sure = metric_intervals(task.kind, images.classes, outputs, values, job.config.seed, groups)
        found.outputs[split] = outputs
        found.intervals_by = None if groups is None else "group"
        found |= {f"{split}/{name}": value for name, value in values.items()}
        found.intervals |= {f"{split}/{name}": interval for name, interval in sure.items()}
        task.kind.write(job.folder.path / f"{task.kind.table}.csv", task.images.classes, outputs.kept(task.kind))
        if calibrated(job, task):
            found.calibration["temperature"] = task.kind.temperature
            found.calibration[split] = errors = calibration_errors(task.kind, outputs)
            shown = ", ".join(f"{name.upper()} {old:.4f} to {new:.4f}" for name, (old, new) in errors.items())
            log.info(f"calibrate {split} {shown} by temperature {task.kind.temperature:.3g}")
        write_predictions(job.folder.path / "predictions.csv", task.kind, task.images, outputs)
    if not task.images.splits["test"]:
        log.warning(
            "There is no test split, so the numbers are those of val, which chose the best epoch: a little too good."
        )
    return found


def _few_of(images: LabelledImages, number: int) -> LabelledImages:
    """About so many images of each split, from its whole length."""
    splits = {split: members[:: max(1, len(members) // number)] for split, members in images.splits.items()}
    return replace(images, splits=splits)


def _diverged(job: Job, loss: float) -> UserError:
    """An epoch with a finite val/loss would have been chosen before these weights."""
    lr = job.config.optimizer.lr / 10
    return UserError(
        f"val/loss of the trained weights is {loss}",
        where=f"{job.folder.path / 'metrics.csv'}, column val/loss",
        why="they have grown too large to compute with, or an image of val gives a loss that is not finite",
        fix=corrected(f"optimizer.lr={lr:.3g}", f"name={free_name(job.folder.path)}"),
        code=ExitCode.DIVERGED,
    )
