"""The images that the feature bank looks at, and by what it knows them again."""

from __future__ import annotations

import hashlib

import torch
from torch.utils.data import Dataset

from src.engine.commands.schema import Config
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.resizing import Transform
from src.engine.own import is_own
from src.engine.runs import seeding


class ViewDataset(Dataset[tuple[torch.Tensor, int]]):
    """index -> uint8 (3, S, S), and the index. view: the epoch whose augmentation it has; None: none."""

    def __init__(self, images: LabelledImages, transform: Transform, seed: int, view: int | None) -> None:
        self.images, self.transform, self.seed, self.view = images, transform, seed, view

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.view is not None:
            seeding.seed_image(self.seed, self.view, index)  # GuardedDataset keeps the generators
        return self.transform(self.images.read(index)), index

    def name(self, index: int) -> str:
        return self.images.location(index)


def persists(config: Config, images: LabelledImages) -> bool:
    """Whether features can be kept on the disk: where nobody can tell that the owner's code, or an image that is no file,
    has changed, they stay in memory."""
    own = is_own(config.data.augment) or is_own(config.model.backbone)
    return not own and not images.no_pixels and (images.digests is not None or images.in_memory)


def names_of(images: LabelledImages) -> list[str]:
    """What each image is known by on the disk: a digest of its file, or of the pixels of one in memory."""
    if images.digests is not None:
        return images.digests
    return [digest_of_pixels(images.read(index)) for index in range(len(images.names))]


def digest_of_pixels(image: torch.Tensor) -> str:
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.contiguous().numpy().data)
    return digest.hexdigest()
