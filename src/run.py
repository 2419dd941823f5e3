"""One run, from the config to its result. Read `run` first: it is all that happens.

Called by src/train.py, once per job, or in each process of a job that has several (strategy=ddp, src/rank.py). The
folder it leaves is described in README.md, 'A run's folder'.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import torch

from src import config as configuration
from src import seeding, trial
from src.batch_size import find_batch_size
from src.batch_size_search import chosen_batch_size
from src.callbacks.checkpoint_selection import BEST
from src.callbacks.freezing import Phases, schedule
from src.callbacks.freezing import apply as freeze
from src.callbacks.gpu_memory import MemoryLog
from src.callbacks.progress import Throughput
from src.callbacks.taking_up import taking_up
from src.checkpoints.checksum import damage
from src.checkpoints.model_folder import ModelCard, save_model
from src.checkpoints.model_readme import model_readme
from src.checkpoints.reading import newest_position
from src.checkpoints.writing import LAST, PREVIOUS
from src.config import Config, device_count
from src.config_checks import without_effect
from src.data.labelled_images import LabelledImages
from src.data.module import ImageData
from src.data.sources import load_images
from src.errors import ExitCode, UserError
from src.evaluation import measure_split
from src.files import write_csv, write_text
from src.machine import begin_peak, choose_devices, peak_memory_mib, set_threads
from src.models.backbones import blocks
from src.models.building import architecture_of, build_loss, build_pretrained, choose_preprocessing
from src.models.classifier import build_classifier
from src.models.network import TransferNetwork
from src.models.weights import refuse_frozen_random
from src.out_of_memory import gpu_faults_explained
from src.preprocessing import Preprocessing
from src.reporting.introduction import introduce
from src.reporting.report import write_report
from src.reporting.tables import print_result, write_confusion
from src.run_dir import RunFolder
from src.run_names import free_name
from src.selection import choose_weights
from src.strategies.building import computing_at_once
from src.strategies.precision import check_precision
from src.strategies.ranks import Ranks, joined
from src.strategies.shared_folder import open_folder
from src.strategies.stage_balance import choose_split
from src.trainer import build_trainer, find_callback
from src.user_command import corrected

log = logging.getLogger(__name__)


def run(config: Config, path: Path) -> float:
    """Trains, evaluates and packages; returns the metric that chose the best epoch. Raises UserError.

    Of several processes all train, and only the first writes, evaluates and packages; the others return nan.
    """
    unread = without_effect(config)
    if config.debug:
        config = configuration.quick(config)
    plain = configuration.plain(config)
    with joined(config) as ranks, open_folder(ranks, path, plain, config.resume) as folder:
        if (done := ranks.told_by_first(folder.result)) is not None:
            log.info(f"{folder.path} is finished already; this is its result.")
            if ranks.is_first:
                if not (folder.path / "report.html").exists():
                    report(folder, done)
                print_result(folder.path, done)
            value = done["metrics"].get(config.checkpoint.monitor)
            return math.nan if value is None else value

        for warning in unread:
            log.warning(warning)
        devices = set_up_machine(config, ranks)
        device = devices[ranks.local_rank]
        peak_is_known = begin_peak(device)
        preprocessing = choose_preprocessing(config.model, config.data)
        start = ranks.after_first(lambda: newest_position(folder.checkpoints, config.trainer.max_epochs))
        images = ranks.after_first(lambda: find_images(config, folder, start, ranks))
        ranks.check_same("images", {"images": len(images.names), "names, labels, splits": images.digest()})
        network, loaded = ranks.after_first(
            lambda: build_pretrained(config.model, images.classes, preprocessing, config.seed)
        )
        parameters = [name for name, _ in network.backbone.named_parameters()]
        phases = schedule(config.freeze, blocks(network.backbone), config.trainer.max_epochs, parameters)
        settle_split(config, network, phases, device, preprocessing.image_size, ranks)
        freeze(network, phases, 0, config.freeze.batchnorm)  # later epochs: FreezingSchedule
        if start is None:  # a run that made steps goes on as it began
            refuse_frozen_random(network, loaded, config.model.weights)
        config = settle_batch_size(config, folder, network, images, preprocessing, phases, device, ranks)
        seen = images if ranks.is_first or config.strategy.name != "pipeline" else images.without_pixels()
        data = ImageData(config.data, seen, preprocessing, config.seed, config.trainer.limit_batches)
        steps = total_steps(config, data)
        model = build_classifier(config, network, images, steps, hparams=plain)
        trainer = build_trainer(config, folder, devices, phases)
        if ranks.is_first:
            introduce(config, folder, images, network, loaded.line, preprocessing, steps, devices, phases)

        fit(trainer, model, data, folder, start)
        if not ranks.leave():
            return math.nan

        best_epoch, chosen = choose_weights(config, folder.checkpoints, trainer, data, phases, device)
        metrics = measure(config, folder, network, images, preprocessing, device)
        package(config, folder, network, images, preprocessing, metrics, loaded.line, chosen, trainer.current_epoch)
        result = folder.finish(
            lambda result: report(folder, result, phases),
            metrics=metrics,
            best_checkpoint=None if damage(folder.checkpoints / BEST) else f"checkpoints/{BEST}",
            best_epoch=best_epoch,
            weights=chosen,
            epochs=trainer.current_epoch,
            steps=trainer.global_step,
            images_per_second=find_callback(trainer, Throughput).images_per_second,
            peak_memory_mib=peak_of(trainer, device) if peak_is_known else None,
            device=str(device),
        )
        if trial.current() is not None:  # a finished run never goes on, and a sweep keeps many
            for name in (LAST, PREVIOUS):
                (folder.checkpoints / name).unlink(missing_ok=True)
        print_result(folder.path, result)
        return metrics[config.checkpoint.monitor]


def set_up_machine(config: Config, ranks: Ranks) -> list[torch.device]:
    """Chooses the devices, checks that they can compute in the precision, and sets the CPU threads.

    Returns those of this machine; of several processes each has the one of its local rank.
    """
    devices = choose_devices(config.trainer.accelerator, config.trainer.devices)
    device = devices[ranks.local_rank]
    check_precision(config.precision.name, device)
    set_threads(config.trainer.threads, sharers=computing_at_once(config, devices))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.memory.history and device.type != "cuda":
        log.warning(f"memory.history=true has no effect on {device.type}: it is about an NVIDIA GPU's allocations.")
    seeding.seed_everything(config.seed)
    return devices


def find_images(config: Config, folder: RunFolder, start: Path | None, ranks: Ranks) -> LabelledImages:
    """The images, checked and split; the split is kept in split.csv. A run that is continued keeps its split."""
    split = folder.path / "split.csv"
    images = load_images(
        config.data,
        config.seed,
        cache_dir=Path(config.runs_dir) / ".checked",
        bad_list=folder.path / "bad_images.txt" if ranks.is_first else None,
        run_split=None if start is None else split,
    )
    if ranks.is_first and start is None:  # what a run has trained on stays written, whatever becomes of the files
        write_csv(split, *images.table())
    return images


def settle_split(
    config: Config, network: TransferNetwork, phases: Phases, device: torch.device, image_size: int, ranks: Ranks
) -> None:
    """model.split_at=auto becomes layers, for the phase of the freezing schedule that trains most."""
    if config.model.split_at not in ("auto", "auto_memory"):
        return
    freeze(network, phases, config.trainer.max_epochs - 1, config.freeze.batchnorm)
    stages = device_count(config.trainer) * config.trainer.num_nodes
    network.backbone.split(ranks.told_by_first(lambda: choose_split(config, network, device, stages, image_size)))


def settle_batch_size(
    config: Config,
    folder: RunFolder,
    network: TransferNetwork,
    images: LabelledImages,
    preprocessing: Preprocessing,
    phases: Phases,
    device: torch.device,
    ranks: Ranks,
) -> Config:
    """data.batch_size=auto becomes a number: the one that the run found when it began, or one that is found now."""
    if config.data.batch_size != "auto":
        return config

    def find() -> int:
        loss, count = build_loss(config, images.counts("train")), len(images.splits["train"])
        shares = device_count(config.trainer) * config.trainer.num_nodes
        size = preprocessing.image_size
        return find_batch_size(config, network, loss, phases, device, count, size, folder.path, devices=shares)

    size = ranks.told_by_first(lambda: chosen_batch_size(folder.path) or find())
    return replace(config, data=replace(config.data, batch_size=size))


def total_steps(config: Config, data: ImageData) -> int:
    """Optimizer steps of the whole run, which the schedule spans."""
    steps = config.trainer.max_epochs * data.steps_per_epoch
    return min(steps, config.trainer.max_steps) if config.trainer.max_steps > 0 else steps


def fit(trainer: L.Trainer, model: L.LightningModule, data: ImageData, folder: RunFolder, start: Path | None) -> None:
    """Trains to the end, from the position in `start` if there is one. Ctrl-C arrives as KeyboardInterrupt."""
    if start is not None:
        log.info(f"continuing from {start}")
    try:
        with gpu_faults_explained(), taking_up(trainer, start):
            trainer.fit(model, data, ckpt_path=start, weights_only=True)
    except SystemExit as error:  # how Lightning ends on Ctrl-C
        raise KeyboardInterrupt from error
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "BatchNorm cannot normalise a single image",
            where=f"step {trainer.global_step + 1}; torch says: {error}",
            why="its statistics are taken over the images that are in a device, or in a micro-batch, at a time",
            fix=[corrected("data.batch_size=64"), corrected("freeze.batchnorm=keep")],
        ) from error


def peak_of(trainer: L.Trainer, device: torch.device) -> int:
    """MiB. The log of a GPU's memory resets torch's own peak in every phase of a step, and keeps the run's itself."""
    memory = find_callback(trainer, MemoryLog)
    return (memory and memory.peak_mib) or peak_memory_mib(device)


def measure(
    config: Config,
    folder: RunFolder,
    network: TransferNetwork,
    images: LabelledImages,
    preprocessing: Preprocessing,
    device: torch.device,
) -> dict[str, float]:
    """{"val/acc": ..., "test/acc": ...}; confusion.csv is of test, or of val where there is no test split."""
    metrics: dict[str, float] = {}
    for split in ("val", "test"):
        if images.splits[split]:
            values, confusion = measure_split(config, network, images, split, preprocessing, device)
            if split == "val" and not math.isfinite(values["loss"]):
                raise UserError(  # an epoch with a finite val/loss would have been chosen before these weights
                    f"val/loss of the trained weights is {values['loss']}",
                    where=f"{folder.path / 'metrics.csv'}, column val/loss",
                    why="they have grown too large to compute with, or an image of val gives a loss that is not finite",
                    fix=corrected(f"optimizer.lr={config.optimizer.lr / 10:.3g}", f"name={free_name(folder.path)}"),
                    code=ExitCode.DIVERGED,
                )
            metrics |= {f"{split}/{name}": value for name, value in values.items()}
            write_confusion(folder.path / "confusion.csv", images.classes, confusion.tolist())
    if not images.splits["test"]:
        log.warning(
            "There is no test split, so the numbers are those of val, which chose the best epoch: a little too good."
        )
    return metrics


def report(folder: RunFolder, result: dict[str, Any], phases: Phases | None = None) -> None:
    """Writes report.html. A page that cannot be made must not turn a run that is complete into a failed one."""
    try:
        write_report(folder.path, phases, result)
    except Exception:
        log.warning("report.html could not be written; train.log says why. The run itself is complete.", exc_info=True)


def package(
    config: Config,
    folder: RunFolder,
    network: TransferNetwork,
    images: LabelledImages,
    preprocessing: Preprocessing,
    metrics: dict[str, float],
    weights: str,
    chosen: str,
    epochs: int,
) -> None:
    """Writes model/: all that is needed to use the network, and a README for whoever gets the folder."""
    card = ModelCard(
        architecture=architecture_of(config.model, images.classes).to_dict(),
        preprocessing=preprocessing,
        classes=images.classes,
        task=config.model.task,
        background=tuple(config.data.background),
        max_megapixels=config.data.max_megapixels,
        channels_last=config.model.channels_last,
        precision=config.precision.name,
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        bits=images.bits,
    )
    save_model(folder.model, network.state_dict(), card)
    readme = model_readme(
        card,
        config,
        name=folder.path.name,
        images={split: len(members) for split, members in images.splits.items()},
        weights=weights,
        chosen=chosen,
        epochs=epochs,
        day=date.today(),
    )
    write_text(folder.model / "README.md", readme)
