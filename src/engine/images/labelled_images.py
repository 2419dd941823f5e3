"""The list of images that everything else works on: names, labels, splits, and how to read one.

A source of images (src/data/sources.py) returns a Listing or an ImageSet; image_files.py makes LabelledImages of either, which
the DataModule, evaluate and the reports use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from src.engine.images.reading import ImageError, read_bytes
from src.engine.runs.text import printable

SPLITS = ("train", "val", "test")
Label = int | tuple[float, ...]  # of an image: its class, an index into names; or one value for each of the names


def by_split(stated: Sequence[str]) -> dict[str, list[int]]:
    """split -> indices, of the split of each image."""
    return {split: [index for index, own in enumerate(stated) if own == split] for split in SPLITS}


@dataclass
class Listing:
    """Image files below a folder, or encoded images from elsewhere: one entry per image, in a fixed order."""

    root: Path
    names: list[str] = field(default_factory=list)  # paths relative to root, with forward slashes
    labels: list[str] = field(default_factory=list)  # class names; of other tasks a table's text, such as 'cat;outdoor'
    splits: list[str] | None = None  # train, val or test of each image, where the data says so
    source: str = ""  # what messages name; "": root
    groups: list[str] | None = None  # the images of a group, such as a patient, are dealt to one split
    grouped_by: str = ""  # the table's column that the groups are of
    content: Callable[[str], bytes] | None = None  # the encoded image of a name; None: the file of that name below root

    def bytes_of(self, name: str) -> bytes:
        """Raises ImageError."""
        if self.content is None:
            return read_bytes(self.root / name, name)
        try:
            return self.content(name)
        except Exception as error:  # of the owner's code, or of a database
            raise ImageError(f"{printable(name)}: cannot be read ({type(error).__name__}: {error})") from error

    def location(self, name: str) -> str:
        return name if self.content else str(self.root / name)

    def only(self, indices: Sequence[int]) -> Listing:
        """The listing of these images alone."""

        def chosen(values: list[str] | None) -> Any:
            return values and [values[index] for index in indices]

        lists = {name: chosen(getattr(self, name)) for name in ("names", "labels", "splits", "groups")}
        return replace(self, **lists)


@dataclass(frozen=True)
class ImageSet:
    """Images that are no files to check: drawn, in memory, or read by another library."""

    name: str  # how its images are called
    classes: tuple[str, ...]
    labels: Sequence[Any]  # indices into classes; of other tasks what a table has: 'cat;outdoor', 3.5, '3.5;70'
    read: Callable[[int], torch.Tensor]  # index -> uint8 (3, H, W)
    splits: list[str] | None = None  # train, val or test of each image; None where the set has no splits
    in_memory: bool = True  # reading is only a lookup: loader processes would cost more than they give
    names: list[str] | None = None  # of the images; None: name/00000, ...
    where: str = ""  # the setting that messages name; "": data=name
    groups: list[str] | None = None  # images of one group, such as a patient's, go to one split together


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images in a fixed order."""

    classes: tuple[str, ...]  # their names; of other tasks what labels have a value for
    names: list[str]  # what identifies each image: its path relative to the root, or set/index for images in memory
    labels: Sequence[Label]  # one per image
    splits: dict[str, list[int]]  # which image belongs to which split, as indices; a split may be empty
    read: Callable[[int], torch.Tensor] = field(repr=False)  # index -> uint8 (3, H, W)
    in_memory: bool = False  # reading is only a lookup: loader processes would cost more than they give
    no_pixels: bool = False  # all images are black: this process needs the labels alone
    bits: int = 16  # how many bits of 16-bit channels are read, see ReadOptions
    root: Path | None = None  # the folder that names start from; None for images in memory
    digests: list[str] | None = field(default=None, repr=False)  # of each file's bytes; None for images in memory
    texts: list[str] | None = field(default=None, repr=False)  # labels as split.csv has them; None: class names
    groups: list[str] | None = field(default=None, repr=False)  # of each image, where the data has some: data.group

    def location(self, index: int) -> str:
        """The file of an image, or its name."""
        return str(self.root / self.names[index]) if self.root else self.names[index]

    def counts(self, split: str) -> list[int]:
        """How many images of each class a split has; of values 0 and 1, how many 1."""
        labels = self.targets(self.splits[split])
        return (labels.bincount(minlength=len(self.classes)) if labels.ndim == 1 else labels.sum(0).long()).tolist()

    def targets(self, indices: Sequence[int]) -> torch.Tensor:
        """The labels of these images: classes int64 (N,), or values float32 (N, names)."""
        return label_tensor([self.labels[index] for index in indices], self.labels[0])

    def label_text(self, index: int) -> str:
        label = self.labels[index]
        return self.classes[label] if isinstance(label, int) else (self.texts or [])[index]

    def rows(self) -> list[tuple[str, str, str]]:
        """(path, label, split) of every image, as split.csv has them."""
        split_of = {index: split for split, members in self.splits.items() for index in members}
        return [
            (name, self.label_text(index), split_of[index])
            for index, name in enumerate(self.names)
            if index in split_of
        ]

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of split.csv. By the digests evaluate recognises an image whose file was moved; by the
        bits a continued run reads as before although the folder may have changed, and it draws the same groups."""
        header: tuple[str, ...] = ("path", "label", "split")
        rows: list[tuple[str, ...]] = [*self.rows()]
        if self.digests is not None:
            digest_of = dict(zip(self.names, self.digests, strict=True))
            header = (*header, "digest", "bits")
            rows = [(*row, digest_of[row[0]], str(self.bits)) for row in rows]
        if self.groups is not None:
            group_of = dict(zip(self.names, self.groups, strict=True))
            header, rows = (*header, "group"), [(*row, group_of[row[0]]) for row in rows]
        return header, rows

    def digest(self) -> str:
        """The same in two processes exactly if both have the same images, labels and splits."""
        return hashlib.sha256(repr(self.rows()).encode()).hexdigest()

    def without_pixels(self) -> LabelledImages:
        """The same list with black images: for a process that needs the labels alone, which then reads nothing."""
        black = torch.zeros(3, 8, 8, dtype=torch.uint8)
        return replace(self, read=lambda index: black, in_memory=True, no_pixels=True)


def label_tensor(labels: Sequence[Label], like: Label) -> torch.Tensor:
    """int64 (N,) or float32 (N, names); like: any label, since there may be none here."""
    if isinstance(like, int):
        return torch.tensor(labels, dtype=torch.int64)
    return torch.tensor(labels, dtype=torch.float32).view(len(labels), len(like))
