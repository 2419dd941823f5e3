"""Measures a model on a split: the numbers that train prints at its end and that evaluate prints again."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

import torch
from rich.progress import track

from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected
from src.engine.feature_bank.bank import FeatureBank
from src.engine.feature_bank.loader import Batches, split_features
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.loading import eval_loader, loader_settings
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import write_csv
from src.engine.runs.job import Job
from src.engine.runs.run_names import free_name
from src.engine.runs.task import RunTask
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.metrics import SplitMetrics
from src.engine.steps.task_kind import Loss

log = logging.getLogger(__name__)


def measure_split(
    model: TrainedModel, images: LabelledImages, split: str, config: Config, loss: Loss, batches: Batches | None = None
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """The loss, the metrics of the task and of the owner, of a split; what the task keeps of each image (N, any); and the
    logits (N, outputs), on the CPU.

    batches: of the split's features and labels, where they are known; None: the images are read."""
    loader = batches or eval_loader(images, split, model.card.preprocessing, loader_settings(config.data, images))
    loss = loss.to(model.device).eval()
    metrics = SplitMetrics(model.kind, model.card.classes, split, config.metrics).to(model.device)
    kept: list[torch.Tensor] = []
    all_logits: list[torch.Tensor] = []
    for batch, labels in track(loader, "measuring", transient=True, disable=not sys.stdout.isatty()):
        logits, labels = model.logits(batch), labels.to(model.device)
        metrics.update(loss(logits, labels), logits, labels, loss.weight(labels))
        kept.append(model.kind.kept(logits, labels).cpu())
        all_logits.append(logits.cpu())
    if not sum(map(len, kept)):
        raise UserError(
            "none of the images to measure on can be read any more",
            why="they could be when they were checked; the lines above name them",
            fix="mend the files, then repeat the command",
            code=ExitCode.DATA,
        )
    return metrics.compute(), torch.cat(kept), torch.cat(all_logits)


def tune(job: Job, task: RunTask) -> None:
    """Has the task choose on val what it does not learn, such as thresholds."""
    if not task.kind.tunes:
        return
    model, outputs = task.trained(job), []
    settings = loader_settings(job.config.data, task.images)
    for batch, labels in eval_loader(task.images, "val", task.preprocessing, settings):
        outputs.append((model.logits(batch).cpu(), labels))
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    task.kind.tune(logits, labels)


def measure(job: Job, task: RunTask, bank: FeatureBank | None = None) -> dict[str, float]:
    """{"val/acc": ..., "test/acc": ...} of the trained network, from the bank where only the head was trained. Writes the
    task's table of results and predictions.csv of test, or of val where there is no test split."""
    model, loss = task.trained(job), task.loss(job.config)
    metrics: dict[str, float] = {}
    known = bank is not None and bank.is_valid()
    for split in [split for split in ("val", "test") if task.images.splits[split]]:
        batches = split_features(bank, split) if bank is not None and known else None
        values, kept, logits = measure_split(model, task.images, split, job.config, loss, batches)
        if split == "val" and not math.isfinite(values["loss"]):
            raise _diverged(job, values["loss"])
        metrics |= {f"{split}/{name}": value for name, value in values.items()}
        task.kind.write(job.folder.path / f"{task.kind.table}.csv", task.images.classes, kept)
        _write_predictions(job.folder.path / "predictions.csv", task, split, logits)
    if not task.images.splits["test"]:
        log.warning(
            "There is no test split, so the numbers are those of val, which chose the best epoch: a little too good."
        )
    return metrics


def _write_predictions(path: Path, task: RunTask, split: str, logits: torch.Tensor) -> None:
    """The columns of src.predict, after the label: a row per image of the split."""
    kind, images, members = task.kind, task.images, task.images.splits[split]
    if len(members) != len(logits):
        log.warning(f"predictions.csv is left out: {len(members) - len(logits)} {split} images broke during the run.")
        return
    answers = kind.answers(logits)  # a row at a time below: as a list they would take much memory
    rows = (
        [images.names[index], images.label_text(index), *kind.row(images.classes, row.tolist())]
        for index, row in zip(members, answers, strict=True)
    )
    write_csv(path, ["path", "label", *kind.header(images.classes)], rows)


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
