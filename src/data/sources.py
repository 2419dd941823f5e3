"""From the config to the list of images: `load_images` is the door of this room.

digits and synthetic live in memory; image_folder and table are files, which are checked before training; torchvision sets
are downloaded and read by torchvision.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from src.config import Data
from src.data import copies, folders, oddities, splits
from src.data.checking import Checked, check_images, refuse_bad_images
from src.data.labelled_images import SPLITS, LabelledImages
from src.data.reading import read_image
from src.data.table import list_table
from src.errors import ExitCode, UserError
from src.preprocessing import ReadOptions
from src.text import printable

log = logging.getLogger(__name__)


def load_images(
    data: Data, seed: int, *, memory: Path, bad_list: Path | None, workers: int, begun: bool = False
) -> LabelledImages:
    """The images of the config: found, checked, split, their classes known. Raises UserError.

    memory: folder that remembers which files were checked; bad_list: where to write the list of files that failed; the
    list of copies goes beside it. begun: data.split_file is that of the run itself, which may be older than a rule by
    which its folder would be refused today.
    """
    if data.source == "digits":
        return _split_in_memory(*_digits(), data, seed)
    if data.source == "synthetic":
        return _split_in_memory(*_synthetic(data, seed), data, seed)
    if data.source == "torchvision":
        from src.data.torchvision_sets import load_torchvision

        return load_torchvision(data, seed)
    if begun and data.bits is None:
        data = replace(data, bits=splits.bits_of_run(Path(data.split_file)))
    listing, checked = _checked_files(data, memory, bad_list, workers, begun)
    digests = [checked[name].digest for name in listing.names]
    found = splits.choose_split(listing.names, listing.labels, listing.splits, data, seed, digests)
    if data.split_file:  # images that it does not list are left out, and a class that only they have
        listing, found = _only_listed(listing, found)
    images = _from_files(listing, found, data, checked)
    where = str(data.table or listing.root)
    list_file = bad_list and bad_list.with_name("copies.txt")
    copies.refuse_copies(images, listing.root, list_file, labels_too=not begun)
    splits.check_splits(images.classes, images.labels, found, where)
    return images


def load_unsplit(data: Data, *, memory: Path, workers: int) -> LabelledImages:
    """Images of files to evaluate on: those of test/ where the data states a split, otherwise all of them, as test."""
    listing, checked = _checked_files(data, memory, None, workers)
    stated = listing.splits or ["test"] * len(listing.names)
    found = {split: [i for i, own in enumerate(stated) if own == split] for split in SPLITS}
    return _from_files(listing, found, data, checked)


def read_options(data: Data) -> ReadOptions:
    return ReadOptions(tuple(data.background), data.max_megapixels, data.bits or 16)


def memory_file(memory: Path, root: Path) -> Path:
    """Where the check of the files below root is remembered."""
    return memory / f"{blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()}.json"


def _checked_files(
    data: Data, memory: Path, bad_list: Path | None, workers: int, begun: bool = False
) -> tuple[folders.Listing, dict[str, Checked]]:
    """The files of data=image_folder or data=table, without the bad ones where data.on_bad_image=skip."""
    listing = _list_files(data, begun)
    checked = check_images(
        listing.root,
        listing.names,
        read_options(data),
        memory_file(memory, listing.root),
        workers,
        show_progress=sys.stderr.isatty(),
        timeout_seconds=data.timeout_seconds,
    )
    return _apply_policy(listing, checked, data, bad_list, begun), checked


def _list_files(data: Data, begun: bool) -> folders.Listing:
    if data.source == "table":
        return list_table(Path(data.table), Path(data.root) if data.root else None)
    root = Path(data.root)
    try:
        return folders.list_image_folder(root, data.layout)
    except UserError as error:
        if not begun or error.code != ExitCode.DATA:
            raise
        rows = splits.read_split_file(Path(data.split_file))
        labels = {name: label for name, (_, label) in rows.items() if label and (root / name).is_file()}
        if not labels:
            raise
        log.warning(f"{error.found}: the run's own split.csv says which images it has, and of which class.")
        return folders.Listing(root, list(labels), list(labels.values()))


def _only_listed(listing: folders.Listing, found: dict[str, list[int]]) -> tuple[folders.Listing, dict[str, list[int]]]:
    kept = sorted(index for members in found.values() for index in members)
    place = {index: new for new, index in enumerate(kept)}
    return listing.only(kept), {split: [place[index] for index in members] for split, members in found.items()}


def _from_files(
    listing: folders.Listing, found: dict[str, list[int]], data: Data, checked: dict[str, Checked]
) -> LabelledImages:
    checked = {name: checked[name] for name in listing.names}
    bits = data.bits or oddities.bits_used(checked)
    oddities.report(checked, bits)
    classes = tuple(sorted(set(listing.labels)))
    number = {name: index for index, name in enumerate(classes)}
    read = partial(_read_file, listing.root, listing.names, replace(read_options(data), bits=bits))
    labels = [number[label] for label in listing.labels]
    digests = ["" if checked[name].error else checked[name].digest for name in listing.names]
    return LabelledImages(classes, listing.names, labels, found, read, bits=bits, root=listing.root, digests=digests)


def _read_file(root: Path, names: list[str], options: ReadOptions, index: int) -> torch.Tensor:
    return read_image(root / names[index], options)


def _apply_policy(
    listing: folders.Listing, checked: dict[str, Checked], data: Data, bad_list: Path | None, begun: bool
) -> folders.Listing:
    """Stops with every bad file named, or leaves them out: data.on_bad_image.

    A run that has begun keeps those that broke since, so that its epochs stay as long: the loaders deal with them.
    """
    bad = {name: entry.error for name, entry in checked.items() if entry.error}
    if not bad:
        return listing
    error = refuse_bad_images(bad, len(listing.names), listing.root, bad_list)
    if data.on_bad_image == "error":
        raise error
    shown = ", ".join(printable(name) for name in list(bad)[:3]) + (", ..." if len(bad) > 3 else "")
    if begun:
        log.warning(f"{len(bad)} of {len(listing.names)} images cannot be read any more: {shown}")
        return listing
    log.warning(f"{len(bad)} of {len(listing.names)} images cannot be read and were left out: {shown}")
    good = listing.only([index for index, name in enumerate(listing.names) if name not in bad])
    gone = sorted(set(listing.labels) - set(good.labels))
    if gone:
        raise UserError(
            f"class {printable(gone[0])} has no image left that can be read",
            where=printable(str(listing.root)),
            why="all its files are damaged or of a format that is not read",
            fix=f"ls -l {shlex.quote(str(listing.root / gone[0]))}",
            code=ExitCode.DATA,
        )
    return good


def _split_in_memory(
    name: str, classes: tuple[str, ...], labels: list[int], read: Callable[[int], torch.Tensor], data: Data, seed: int
) -> LabelledImages:
    names = [f"{name}/{index:05d}" for index in range(len(labels))]
    found = splits.choose_split(names, [classes[label] for label in labels], None, data, seed)
    splits.check_splits(classes, labels, found, f"data={name}")
    return LabelledImages(classes, names, labels, found, read, in_memory=True)


def _digits() -> tuple[str, tuple[str, ...], list[int], Callable[[int], torch.Tensor]]:
    """scikit-learn's digits: 8x8, 17 levels of grey (UCI Optical Recognition of Handwritten Digits)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    return "digits", tuple(map(str, digits.target_names)), digits.target.tolist(), partial(_grey_image, grey)


def _grey_image(grey: torch.Tensor, index: int) -> torch.Tensor:
    return grey[index].expand(3, -1, -1)


def _synthetic(data: Data, seed: int) -> tuple[str, tuple[str, ...], list[int], Callable[[int], torch.Tensor]]:
    from src.data.synthetic import draw

    num_classes = data.num_classes or 3
    labels = [index % num_classes for index in range(data.num_images or 240)]
    classes = tuple(f"class{label}" for label in range(num_classes))
    return "synthetic", classes, labels, partial(draw, seed, num_classes)
