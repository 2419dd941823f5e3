"""Measures a model on a split: the numbers that train prints at its end and that evaluate prints again."""

from __future__ import annotations

import logging
import math
import sys

import torch
from rich.progress import track

from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.loading import eval_loader, loader_settings
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.job import Job
from src.engine.runs.run_names import free_name
from src.engine.runs.tables import write_confusion
from src.engine.runs.task import RunTask
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.metrics import SplitMetrics
from src.engine.steps.outputs import Loss, predicted_classes

log = logging.getLogger(__name__)


def measure_split(
    model: TrainedModel, images: LabelledImages, split: str, config: Config, loss: Loss
) -> tuple[dict[str, float], torch.Tensor]:
    """loss, acc, balanced_acc, macro_f1 and the owner's metrics of a split, and its confusions: int64 (K, 3), a true class, a
    predicted class and how many images, of each pair that occurred."""
    loader = eval_loader(images, split, model.card.preprocessing, loader_settings(config.data, images))
    loss = loss.to(model.device).eval()
    metrics = SplitMetrics(len(model.card.classes), loss.task, config.metrics).to(model.device)
    pairs: list[torch.Tensor] = []
    for batch, labels in track(loader, "measuring", transient=True, disable=not sys.stdout.isatty()):
        logits, labels = model.logits(batch), labels.to(model.device)
        metrics.update(loss(logits, labels), logits, labels, loss.weight(labels))
        pairs.append(torch.stack([labels, predicted_classes(logits, loss.task)], 1))
    if not sum(map(len, pairs)):
        raise UserError(
            "none of the images to measure on can be read any more",
            why="they could be when they were checked; the lines above name them",
            fix="mend the files, then repeat the command",
            code=ExitCode.DATA,
        )
    confusions, counts = torch.cat(pairs).cpu().unique(dim=0, return_counts=True)
    return metrics.compute(), torch.cat([confusions, counts[:, None]], 1)


def measure(job: Job, task: RunTask) -> dict[str, float]:
    """{"val/acc": ..., "test/acc": ...} of the trained network. Writes confusion.csv of test, or of val where there is no
    test split."""
    model, loss = task.trained(job), task.loss(job.config)
    metrics: dict[str, float] = {}
    for split in [split for split in ("val", "test") if task.images.splits[split]]:
        values, confusions = measure_split(model, task.images, split, job.config, loss)
        if split == "val" and not math.isfinite(values["loss"]):
            raise _diverged(job, values["loss"])
        metrics |= {f"{split}/{name}": value for name, value in values.items()}
        write_confusion(job.folder.path / "confusion.csv", task.images.classes, confusions.tolist())
    if not task.images.splits["test"]:
        log.warning(
            "There is no test split, so the numbers are those of val, which chose the best epoch: a little too good."
        )
    return metrics


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
