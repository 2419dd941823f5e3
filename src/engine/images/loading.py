"""Datasets and loaders: from the list of images to batches of bytes. Training, evaluate and predict share them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch.utils.data import Dataset

from src.engine.commands.schema import Data
from src.engine.images.image_loader import ImageLoader, LoaderSettings, image_loader
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.resizing import Transform, eval_transform
from src.engine.images.sampler import PADDING, WHOLE, EpochSampler, PartSampler, Share, padding_label
from src.engine.runs import seeding
from src.engine.runs.cores import cpu_cores
from src.engine.weights.preprocessing import Preprocessing

Item = tuple[torch.Tensor, torch.Tensor]


class TrainDataset(Dataset[Item]):
    """key (epoch, index) -> uint8 (3, S, S), label; the augmentation is f(seed, epoch, index)."""

    def __init__(self, images: LabelledImages, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        seeding.seed_image(self.seed, epoch, index)  # GuardedDataset keeps the generators
        return self.transform(self.images.read(index)), self.images.targets([index])[0]

    def name(self, index: int) -> str:
        return self.images.location(index)

    def replacements(self, key: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """The following images of the split, of classes only those of the same one: with one of them a batch keeps its size,
        and its labels where they weigh."""
        epoch, index = key
        return ((epoch, other) for other in replacements(self.images, index))


def replacements(images: LabelledImages, index: int) -> Iterator[int]:
    """The training images that may stand in for one that cannot be read, in order."""
    members, labels = images.splits["train"], images.labels
    place = members.index(index)
    others = chain(members[place + 1 :], members[:place])
    return (other for other in others if labels[other] == labels[index] or not isinstance(labels[index], int))


class EvalDataset(Dataset[Item]):
    """The i-th image of a split -> uint8 (3, S, S), label."""

    def __init__(self, images: LabelledImages, split: str, transform: Transform) -> None:
        self.images, self.indices, self.transform = images, images.splits[split], transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Item:
        index = self.indices[place]
        label = self.images.targets([index])[0]
        return self.transform(self.images.read(index)), padding_label(label) if place == PADDING else label

    def name(self, place: int) -> str:
        return self.images.location(self.indices[place])


def train_loader(
    images: LabelledImages, transform: Transform, sampler: EpochSampler, settings: LoaderSettings, image_size: int
) -> ImageLoader:
    """Batches (uint8 (B, 3, S, S), labels) in the sampler's order. The augmentation has its seed."""
    dataset = TrainDataset(images, transform, sampler.seed)
    return image_loader(dataset, sampler, settings, image_size, replacements=dataset.replacements)


def eval_loader(
    images: LabelledImages, split: str, preprocessing: Preprocessing, settings: LoaderSettings, share: Share = WHOLE
) -> ImageLoader:
    """Batches (uint8 (B, 3, S, S), labels) of a split in the order of the list; used by training and by evaluate.

    share: the part of every batch that this process measures.
    """
    dataset = EvalDataset(images, split, eval_transform(preprocessing))
    sampler = PartSampler(len(dataset), settings.batch_size, share)
    return image_loader(dataset, sampler, settings, preprocessing.image_size)


def num_workers(total: int | None, images: LabelledImages, processes: int = 1) -> int:
    """Loader processes of one of the training processes on this machine: its share of the total; None: a core each."""
    if images.no_pixels:
        total = 0
    elif total is None:
        total = 0 if images.in_memory else min(cpu_cores(), 16)
    return -(-total // processes)


def loader_settings(data: Data, images: LabelledImages, processes: int = 1) -> LoaderSettings:
    """For one of the processes that train on this machine."""
    workers = num_workers(data.num_workers, images, processes)
    return LoaderSettings(data.batch_size, workers, data.timeout_seconds, data.on_bad_image == "skip")
