"""Images that are no files to check: drawn, in memory, or read by another library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from src.engine.images import splits
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.splits import SplitSettings


@dataclass(frozen=True)
class ImageSet:
    """name: how its images are called. labels: indices into classes. read: index -> uint8 (3, H, W).

    splits: train, val or test of each image, None where the set has no splits. in_memory: reading is only a lookup, so
    loader processes would cost more than they give. names: of the images; None: name/00000, ... where: the setting that
    messages name; "": data=name.
    """

    name: str
    classes: tuple[str, ...]
    labels: list[int]
    read: Callable[[int], torch.Tensor]
    splits: list[str] | None = None
    in_memory: bool = True
    names: list[str] | None = None
    where: str = ""


def split_image_set(images: ImageSet, settings: SplitSettings) -> LabelledImages:
    """The set with the split that it states, or with a stratified one. Raises UserError for classes that cannot be learned."""
    classes, labels = images.classes, images.labels
    names = images.names or [f"{images.name}/{index:05d}" for index in range(len(labels))]
    members = splits.choose_split(names, [classes[label] for label in labels], images.splits, settings)
    splits.check_splits(classes, labels, members, images.where or f"data={images.name}")
    return LabelledImages(classes, names, labels, members, images.read, in_memory=images.in_memory)
