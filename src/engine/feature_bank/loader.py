"""Batches of features in the place of images, in the epochs in which the backbone is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from src.engine.feature_bank.bank import FeatureBank
from src.engine.images.image_loader import ImageLoader
from src.engine.images.loading import replacements
from src.engine.images.sampler import PADDING, WHOLE, EpochSampler, PartSampler, Share, padding_label
from src.engine.runs.machine import one_thread

Batches = Iterator[tuple[Tensor, Tensor]]


class BankedLoader:
    """An ImageLoader, or batches of features where `is_banked` says so. Both have the same images and labels."""

    def __init__(self, loader: ImageLoader, is_banked: Callable[[], bool], features: Callable[[], Batches]) -> None:
        self.loader, self.is_banked, self.features = loader, is_banked, features
        self.batch_sampler = loader.batch_sampler  # where Lightning looks for set_epoch

    def __len__(self) -> int:
        return len(self.loader)

    def end(self) -> None:
        self.loader.end()

    def __iter__(self) -> Batches:
        return self.features() if self.is_banked() else iter(self.loader)


def train_features(bank: FeatureBank, sampler: EpochSampler) -> Batches:
    """(B, F), labels: the batches of the sampler's epoch."""
    images = bank.images
    table = bank.table(images.splits["train"], bank.view_of(sampler.epoch))
    all_there = bool(table.has[images.splits["train"]].all())
    for keys in sampler:
        indices = [index for _, index in keys]
        if not all_there:
            indices = [index if table.has[index] else _stand_in(bank, table.has, index) for index in indices]
        with one_thread():
            rows = table.rows.index_select(0, torch.tensor(indices))
        yield rows, images.targets(indices)


def _stand_in(bank: FeatureBank, has: Tensor, index: int) -> int:
    return next(other for other in replacements(bank.images, index) if has[other])


def split_features(bank: FeatureBank, split: str, share: Share = WHOLE) -> Batches:
    """(B, F), labels: a split in the order of the list, without augmentation."""
    images = bank.images
    indices = images.splits[split]
    table = bank.table(indices)
    for places in PartSampler(len(indices), bank.job.config.data.batch_size, share):
        members = [indices[place] for place in places if table.has[indices[place]]]
        if not members:
            continue
        labels = images.targets(members)
        yield table.rows[members], torch.stack([*map(padding_label, labels)]) if places == [PADDING] else labels
