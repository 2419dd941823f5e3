"""The baseline: what a linear model on the features of the untouched backbone reaches, before anything is trained.

It costs one pass over the images, which head-only epochs use as well (src/engine/feature_bank). Training has to beat it; with
baseline=only (model=features) it is the run.
"""

from __future__ import annotations

import logging
import math
from copy import deepcopy

import lightning as L
import torch
from torch import Tensor, nn

from src.engine import features
from src.engine.baseline.doubts import write_doubts
from src.engine.baseline.linear import LinearModel, fit_linear
from src.engine.baseline.verdict import BASELINE, Baseline, introduced
from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected
from src.engine.feature_bank.bank import FeatureBank, Table
from src.engine.runs import seeding
from src.engine.runs.checkpoint_selection import BestCheckpoint, Score, State
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.job import Job
from src.engine.runs.outputs import Outputs
from src.engine.runs.selection import Chosen, find_callback
from src.engine.runs.task import RunTask
from src.engine.runs.text import decimal
from src.engine.steps.metrics import SplitMetrics
from src.engine.steps.network import Network
from src.engine.weights.low_rank import merge, merged

log = logging.getLogger(__name__)

SPLITS = ("val", "test", "train")  # the order in which features are computed


def measure_baseline(job: Job, task: RunTask, bank: FeatureBank | None) -> Baseline | None:
    """Nothing where it is not asked for. All processes of a run call it together. Raises UserError where there is no bank, and
    the run would be the baseline alone."""
    if bank is None and job.config.baseline == "only":
        raise UserError(
            "baseline=only: the features of all images take over a quarter of the free memory",
            why="a linear model is fitted to all of them at once",
            fix=corrected("model.backbone=resnet18"),
            code=ExitCode.OUT_OF_MEMORY,
        )
    if job.config.baseline == "keep" and (bank is None or job.config.trainer.limit_batches):
        why = "there are no features of all images to fit it to" if bank is None else "only a few steps are made"
        log.warning(f"baseline=keep has no effect: {why}.")
    if bank is None or not is_asked_for(job.config):
        return None
    return fit_baseline(job, task, bank)


def fit_baseline(job: Job, task: RunTask, bank: FeatureBank) -> Baseline | None:
    """Nothing in the processes beside the first. Writes doubts.csv."""
    for split in SPLITS:  # one after the other, in the batches in which evaluate reads them
        bank.table(task.images.splits[split])
    table = bank.table(())
    if not job.ranks.is_first:
        job.ranks.told_by_first(dict)  # the fit may take longer than a message
        return None
    baseline, model = _fit(job, task, table)
    if job.config.baseline in ("keep", "only"):
        baseline.state = with_head(task.network, model)
        if job.config.baseline == "only":
            merge(task.network)
            task.network.load_state_dict(baseline.state)
    log.info(f"baseline  {introduced(baseline, job.config.checkpoint.monitor)}")
    log.info("")
    job.ranks.told_by_first(dict)
    return baseline


def is_asked_for(config: Config) -> bool:
    """Not beside a few steps (debug=true), and not in the trials of a sweep, which would all have the same."""
    if config.baseline in ("none", "only"):
        return config.baseline == "only"
    is_trial = config.baseline == "show" and features.supervisor() is not None
    return not config.trainer.limit_batches and not is_trial


def _fit(job: Job, task: RunTask, table: Table) -> tuple[Baseline, LinearModel]:
    images, config = task.images, job.config
    loss = task.loss(config).to(job.device).eval()

    def of(split: str) -> tuple[Tensor, Tensor]:
        members = [index for index in images.splits[split] if table.has[index]]
        measured.extend(members)
        return table.rows[members].to(job.device), images.targets(members).to(job.device)

    def metrics(split: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
        split_metrics = SplitMetrics(found.kind, images.classes, split, config.metrics).to(job.device)
        split_metrics.sync(False)
        split_metrics.update(loss(logits, labels), logits, labels, loss.weight(labels))
        return {name: value for name, value in split_metrics.compute().items() if math.isfinite(value)}

    measured: list[int] = []  # images with features, and the logits of models that were not fitted to them
    rows, labels = of("train")
    order = seeding.generator(config.seed, "folds")
    model = fit_linear(
        rows, labels, loss, task.kind.outputs(images.classes), torch.randperm(len(rows), generator=order).tolist()
    )
    unseen = [model.held_out]
    found = Baseline(deepcopy(task.kind), model.strength)
    for split in [split for split in ("val", "test") if images.splits[split]]:
        rows, labels = of(split)
        if not len(rows):  # all have broken; measure_split says so
            continue
        logits = model.logits(rows)
        unseen.append(logits)
        if split == "val":
            found.as_epochs = {f"val/{name}": value for name, value in metrics(split, logits, labels).items()}
            if found.kind.tunes:
                found.kind.tune(logits, labels)
        outputs = Outputs(logits.cpu(), labels.cpu(), measured[-len(rows) :])
        found.add(split, metrics(split, logits, labels), outputs, task, config.seed)
    write_doubts(job.folder.path / "doubts.csv", task, measured, torch.cat(unseen).cpu())
    return found, model


def with_head(network: Network, model: LinearModel) -> State:
    """The network's weights with the linear model in the place of its head, which is one layer."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in merged(network.state_dict()).items()}
    layer = [
        name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and name.startswith("head")
    ][-1]
    return state | {f"{layer}.weight": model.weight.cpu(), f"{layer}.bias": model.bias.cpu()}


def unless_beaten(job: Job, task: RunTask, trainer: L.Trainer, chosen: Chosen, baseline: Baseline | None) -> Chosen:
    """With baseline=keep a run ends with the baseline where no epoch is as good on val."""
    if baseline is None or baseline.state is None or "val/loss" not in baseline.as_epochs:
        return chosen
    monitor, best = job.config.checkpoint.monitor, find_callback(trainer, BestCheckpoint)
    score = Score.of(baseline.as_epochs, monitor)
    if best is None or not best.kept or best.kept[0].goodness[:2] >= score.goodness[:2]:
        return chosen
    log.info(
        f"select    the baseline, which is better on val than any epoch: {monitor} {decimal(baseline.as_epochs[monitor])}"
    )
    task.network.load_state_dict(baseline.state)
    return Chosen(0, BASELINE)
