"""A task: what a run learns. Which images, seen how, by which network, and what of it is frozen when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch.optim import Optimizer

from src.config import Config, Data
from src.data.sources import load_images
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.resizing import with_side_to_keep
from src.engine.memory.gradient_checkpoints import checkpoint_gradients
from src.engine.runs.epochs import epochs_of
from src.engine.runs.files import write_csv
from src.engine.runs.job import Job
from src.engine.runs.model_folder import ModelCard
from src.engine.runs.task import RunTask
from src.engine.steps.network import Network
from src.engine.steps.task_kind import TaskKind
from src.engine.weights.low_rank import add_adapters
from src.engine.weights.preprocessing import Preprocessing
from src.engine.weights.weights import refuse_frozen_random
from src.models.backbones import blocks
from src.models.building import architecture_of, build_pretrained, choose_preprocessing
from src.models.freezing import FreezePlan
from src.models.network import TransferNetwork
from src.models.optimizers import build_optimizer
from src.tasks.building import build_task_kind


@dataclass(frozen=True)
class Task(RunTask):
    """The network, and how it is trained."""

    network: TransferNetwork
    freezing: FreezePlan

    def optimizer(self, config: Config, network: Network) -> Optimizer:
        return build_optimizer(network, config.optimizer, config.freeze.lr_decay)


def build_task(job: Job) -> Task:
    """The images, checked and split, and the network with its pretrained weights, as frozen in epoch 0.

    Raises UserError; of several processes also where one has other images.
    """
    ranks, preprocessing = job.ranks, choose_preprocessing(job.config.model, job.config.data)
    config = replace(job.config, data=with_side_to_keep(job.config.data, preprocessing))
    kind = build_task_kind(config.task)
    images = ranks.after_first(lambda: _find_images(job, config.data, kind))
    kind.fit(images)
    ranks.check_same("images", {"images": len(images.names), "names, labels, splits": images.digest()})
    network, loaded = ranks.after_first(
        lambda: build_pretrained(config.model, kind, images.classes, preprocessing, config.seed)
    )
    network.compiled = config.trainer.compile
    if config.memory.checkpoint_gradients:
        checkpoint_gradients(network.backbone, blocks(network.backbone))
    add_adapters(network.backbone, config.freeze.lora_rank, config.seed)
    freezing = FreezePlan.of(config.freeze, network.backbone, epochs_of(config, len(images.splits["train"])))
    freezing.apply(network, 0)  # the later epochs: callbacks/freezing.py
    if job.resume_point is None:  # a run that made steps goes on as it began
        refuse_frozen_random(network, loaded, config.model.weights)
    return Task(images, kind, _card(config, kind, images, preprocessing), network, freezing, loaded.line)


def _card(config: Config, kind: TaskKind, images: LabelledImages, preprocessing: Preprocessing) -> ModelCard:
    red, green, blue = config.data.background
    return ModelCard(
        architecture=architecture_of(config.model, kind, images.classes).to_dict(),
        preprocessing=preprocessing,
        classes=images.classes,
        task=kind.name,
        background=(red, green, blue),
        max_megapixels=config.data.max_megapixels,
        channels_last=config.model.channels_last,
        precision=config.precision.name,
        metrics={},
        bits=images.bits,
        keep_side=config.data.keep_side or 0,
        task_values=kind.values,
        task_options=config.task.options,
    )


def _find_images(job: Job, data: Data, kind: TaskKind) -> LabelledImages:
    """A run that is continued keeps its split, which is in split.csv."""
    split, begun = job.folder.path / "split.csv", job.resume_point is not None
    images = load_images(
        data,
        kind,
        job.config.seed,
        cache_dir=Path(job.config.runs_dir) / ".checked",
        bad_list=job.folder.path / "bad_images.txt" if job.ranks.is_first else None,
        run_split=split if begun else None,
    )
    if job.ranks.is_first and not begun:  # what a run has trained on stays written, whatever becomes of the files
        write_csv(split, *images.table())
    return images
