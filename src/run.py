"""One run, from the config to its result. Read `run` first: it is all that happens.

Called by src/train.py, once per job, or in each process of a job that has several (strategy=ddp,
src/rank.py). The folder it leaves is described in README.md, 'A run's folder'.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from datetime import date
from pathlib import Path

import lightning as L

from src.config import Config
from src.data.module import ImageData
from src.data.transforms import train_transform
from src.engine import features
from src.engine.baseline.baseline import measure_baseline, unless_beaten
from src.engine.baseline.verdict import BASELINE, Baseline, for_result
from src.engine.doctor.labels import look_for_doubts
from src.engine.doctor.step_clock import StepClock, note_rehearsal
from src.engine.feature_bank.bank import FeatureBank, build_bank
from src.engine.memory.memory_log import MemoryLog
from src.engine.runs.checkpoint_selection import BEST
from src.engine.runs.checksum import damage
from src.engine.runs.epochs import steps_of
from src.engine.runs.files import write_text
from src.engine.runs.fit_errors import explained
from src.engine.runs.introduction import introduce
from src.engine.runs.job import Job, open_job, report
from src.engine.runs.machine import peak_memory_mib
from src.engine.runs.measuring import Measured, measure, tune
from src.engine.runs.model_folder import save_model
from src.engine.runs.model_readme import Origin, model_readme
from src.engine.runs.patience import ended_by
from src.engine.runs.progress import Throughput
from src.engine.runs.selection import Chosen, choose_weights, find_callback
from src.engine.runs.shown import Shown, read_by_name
from src.engine.runs.tables import print_result
from src.engine.runs.ties import tied_epochs
from src.engine.steps.precision_choice import with_precision
from src.models.classifier import build_classifier
from src.task import Task, build_task
from src.trainer import build_trainer

log = logging.getLogger(__name__)


def run(config: Config, path: Path) -> float:
    """Trains, evaluates and packages; returns the metric that chose the best epoch. Raises UserError.

    Of several processes all train, and only the first writes, evaluates and packages; the others return nan.
    """
    with open_job(config, path) as job:
        if (metric := job.finished()) is not None:
            return metric
        task = build_task(job)  # images checked and split, network with pretrained weights, what is frozen when
        job, task = with_precision(job, task)  # precision=auto
        job = features.prepare(job, task)  # what optional rooms measure first
        bank = build_bank(job, task, train_transform(task.preprocessing, job.config.data.augment))  # features, once
        data = build_data(job, task, bank)
        steps = steps_of(job.config, len(task.images.splits["train"]))
        model = build_classifier(job.config, task, steps, hparams=job.folder.config)
        trainer = build_trainer(job, task)
        introduce(job, task, steps)
        baseline = measure_baseline(job, task, bank)  # what training has to beat
        if job.config.baseline == "only":
            chosen = Chosen(0, BASELINE)
        else:
            fit(job, trainer, model, data)  # from where an earlier start left off
            if not job.ranks.leave():  # of several processes the first goes on alone
                return math.nan
            chosen = choose_weights(job, task, trainer)  # puts them into the network
            chosen = unless_beaten(job, task, trainer, chosen, baseline)
        tune(job, task)  # what the task chooses on val, such as thresholds
        metrics = measure(job, task, bank)
        package(job, task, trainer, chosen, metrics)  # model/
        finish(job, task, trainer, chosen, metrics, baseline)  # report.html and result.json
        return metrics[job.config.checkpoint.monitor]


def rehearse(config: Config, path: Path) -> None:
    """What src.doctor tries: a run until after its first steps of each phase, as debug=true has them."""
    with open_job(config, path) as job:
        job, task = with_precision(job, build_task(job))
        job = features.prepare(job, task)
        bank = build_bank(job, task, train_transform(task.preprocessing, job.config.data.augment))
        data = build_data(job, task, None)
        steps = steps_of(job.config, len(task.images.splits["train"]))
        model = build_classifier(job.config, task, steps, hparams=job.folder.config)
        trainer, clock = build_trainer(job, task), StepClock()
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        introduce(job, task, steps)
        labels = look_for_doubts(job, task, bank)
        fit(job, trainer, model, data)
        if job.ranks.leave():
            note_rehearsal(job, task, clock.seconds, peak_memory(job, trainer), labels)


def build_data(job: Job, task: Task, bank: FeatureBank | None) -> ImageData:
    """The DataModule. Where all processes work on the same batch, only the first needs the images."""
    looks = job.ranks.is_first or features.shares_batches(job.config.strategy.name)
    images = task.images if looks else task.images.without_pixels()
    config = job.config
    return ImageData(config.data, images, task.preprocessing, config.seed, config.trainer.limit_batches, bank)


def fit(job: Job, trainer: L.Trainer, model: L.LightningModule, data: ImageData) -> None:
    start = job.resume_point
    if start is not None:
        log.info(f"continuing from {start}")
    with explained(trainer, start):
        trainer.fit(model, data, ckpt_path=start, weights_only=True)


def package(job: Job, task: Task, trainer: L.Trainer, chosen: Chosen, metrics: Measured) -> None:
    """Writes model/: all that is needed to use the network, and a README for whoever gets the folder."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    card = replace(task.card, metrics=finite, task_values=task.kind.values)
    save_model(job.folder.model, task.network.state_dict(), card)
    images = {split: len(members) for split, members in task.images.splits.items()}
    name, epochs = job.folder.path.name, trainer.current_epoch
    origin = Origin(name, images, task.origin, chosen.name, epochs, date.today(), metrics.intervals)
    origin = replace(origin, intervals_by=metrics.intervals_by)
    write_text(job.folder.model / "README.md", model_readme(card, task.kind, job.config, origin))


def finish(
    job: Job, task: Task, trainer: L.Trainer, chosen: Chosen, metrics: Measured, baseline: Baseline | None
) -> None:
    """Writes the report and, as the last file, result.json; prints both and the next command to try."""
    folder, throughput = job.folder, find_callback(trainer, Throughput)
    result = folder.finish(
        lambda result: report(folder, result, task.freezing.phases, shown(job, task), trainer.loggers),
        metrics=metrics,
        intervals=metrics.intervals,
        intervals_by=metrics.intervals_by,
        val_ties=tied_epochs(folder.path, job.config, metrics.intervals, task.images.splits),
        calibration=metrics.calibration or None,
        best_checkpoint=None if damage(folder.checkpoints / BEST) else f"checkpoints/{BEST}",
        best_epoch=chosen.best_epoch,
        weights=chosen.name,
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        ended_by=ended_by(trainer),
        images_per_second=throughput.images_per_second if throughput else None,
        peak_memory_mib=peak_memory(job, trainer),
        device=str(job.device),
        precision=job.config.precision.name,
        baseline=for_result(job, task, metrics, baseline, chosen) if baseline else None,
    )
    print_result(folder.path, result)


def shown(job: Job, task: Task) -> Shown:
    """For the images in the report."""
    augmented = train_transform(task.preprocessing, job.config.data.augment)
    return Shown(job.config, read_by_name(task.images), task.preprocessing, augmented, task.trained(job))


def peak_memory(job: Job, trainer: L.Trainer) -> int | None:
    """MiB. On a GPU MemoryLog resets torch's own peak in every phase of a step, and keeps the run's itself."""
    if not job.peak_is_known:
        return None
    memory_log = find_callback(trainer, MemoryLog)
    if memory_log is not None and memory_log.peak_mib:
        return memory_log.peak_mib
    return peak_memory_mib(job.device)
