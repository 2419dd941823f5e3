"""From the config to the list of pictures: `load_pictures` is the door of this room.

digits and synthetic live in memory; image_folder and table are files, which are checked before training; torchvision sets
are downloaded and read by torchvision.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from src.config import Data
from src.data import folders, oddities, splits
from src.data.checking import Checked, check_pictures, refuse_bad_pictures, same_bytes_across
from src.data.pictures import SPLITS, Pictures
from src.data.reading import ReadOptions, read_picture
from src.errors import ExitCode, UserError

log = logging.getLogger(__name__)


def load_pictures(data: Data, seed: int, *, memory: Path, bad_list: Path | None, workers: int) -> Pictures:
    """The pictures of the config: found, checked, split, their classes known. Raises UserError.

    memory: folder that remembers which files were checked; bad_list: where to write the list of files that failed.
    """
    if data.source == "digits":
        return _split_in_memory(*_digits(), data, seed)
    if data.source == "synthetic":
        return _split_in_memory(*_synthetic(data, seed), data, seed)
    if data.source == "torchvision":
        from src.data.torchvision_sets import load_torchvision

        return load_torchvision(data, seed)
    listing, checked = _checked_files(data, memory, bad_list, workers)
    found = splits.choose_split(listing.names, listing.labels, listing.splits, data, seed)
    if data.split_file:  # pictures that it does not list are left out, and a class that only they have
        listing, found = _only_listed(listing, found)
    pictures = _from_files(listing, found, data, checked)
    where = str(data.table or listing.root)
    splits.check_splits(pictures.classes, pictures.labels, found, where)
    _refuse_leaks(listing.names, checked, found, where)
    return pictures


def load_unsplit(data: Data, *, memory: Path, workers: int) -> Pictures:
    """Pictures of files to evaluate on: those of test/ where the data states a split, otherwise all of them, as test."""
    listing, checked = _checked_files(data, memory, None, workers)
    stated = listing.splits or ["test"] * len(listing.names)
    found = {split: [i for i, own in enumerate(stated) if own == split] for split in SPLITS}
    return _from_files(listing, found, data, checked)


def read_options(data: Data) -> ReadOptions:
    return ReadOptions(tuple(data.background), data.max_megapixels, data.bits or 16)


def _checked_files(
    data: Data, memory: Path, bad_list: Path | None, workers: int
) -> tuple[folders.Listing, dict[str, Checked]]:
    """The files of data=image_folder or data=table, without the bad ones where data.on_bad_image=skip."""
    if data.source == "table":
        listing = folders.list_table(Path(data.table), Path(data.root) if data.root else None)
    else:
        listing = folders.list_image_folder(Path(data.root))
    checked = check_pictures(
        listing.root,
        listing.names,
        read_options(data),
        memory / f"{_memory_name(listing.root)}.json",
        workers,
        show_progress=sys.stderr.isatty(),
    )
    return _apply_policy(listing, checked, data, bad_list), checked


def _only_listed(listing: folders.Listing, found: dict[str, list[int]]) -> tuple[folders.Listing, dict[str, list[int]]]:
    kept = sorted(index for members in found.values() for index in members)
    place = {index: new for new, index in enumerate(kept)}
    return listing.only(kept), {split: [place[index] for index in members] for split, members in found.items()}


def _from_files(
    listing: folders.Listing, found: dict[str, list[int]], data: Data, checked: dict[str, Checked]
) -> Pictures:
    bits = data.bits or oddities.bits_used(checked)
    oddities.report(checked, bits)
    classes = tuple(sorted(set(listing.labels)))
    number = {name: index for index, name in enumerate(classes)}
    read = partial(_read_file, listing.root, listing.names, replace(read_options(data), bits=bits))
    return Pictures(classes, listing.names, [number[label] for label in listing.labels], found, read, bits=bits)


def _read_file(root: Path, names: list[str], options: ReadOptions, index: int) -> torch.Tensor:
    return read_picture(root / names[index], options)


def _memory_name(root: Path) -> str:
    from hashlib import blake2b

    return blake2b(str(root.resolve()).encode(), digest_size=8).hexdigest()


def _apply_policy(
    listing: folders.Listing, checked: dict[str, Checked], data: Data, bad_list: Path | None
) -> folders.Listing:
    """Stops with every bad file named, or leaves them out: data.on_bad_image."""
    bad = {name: entry.error for name, entry in checked.items() if entry.error}
    if not bad:
        return listing
    error = refuse_bad_pictures(bad, len(listing.names), listing.root, bad_list)
    if data.on_bad_image == "error":
        raise error
    shown = ", ".join(list(bad)[:3]) + (", ..." if len(bad) > 3 else "")
    log.warning(f"{len(bad)} of {len(listing.names)} pictures cannot be read and were left out: {shown}")
    good = listing.only([index for index, name in enumerate(listing.names) if name not in bad])
    gone = sorted(set(listing.labels) - set(good.labels))
    if gone:
        raise UserError(
            f"class {gone[0]} has no picture left that can be read",
            where=str(listing.root),
            why="all its files are damaged or of a format that is not read",
            fix=f"ls -l {listing.root / gone[0]}",
            code=ExitCode.DATA,
        )
    return good


def _refuse_leaks(names: list[str], checked: dict[str, Checked], found: dict[str, list[int]], where: str) -> None:
    """The same bytes in two splits make the numbers of the held-out one too good."""
    split_of = {names[index]: split for split, members in found.items() for index in members}
    groups = same_bytes_across({name: checked[name] for name in split_of}, split_of)
    if groups:
        shown = [" = ".join(f"{name} ({split_of[name]})" for name in group[:3]) for group in groups[:4]]
        raise UserError(
            f"{len(groups)} picture{'s are' if len(groups) > 1 else ' is'} in more than one split, byte for byte",
            where=where,
            why="\n".join(["what was trained on cannot be used to measure:", *shown]),
            fix=f"delete the copies, for instance: rm {where}/{groups[0][-1]}",
            code=ExitCode.DATA,
        )


def _split_in_memory(
    name: str, classes: tuple[str, ...], labels: list[int], read: Callable[[int], torch.Tensor], data: Data, seed: int
) -> Pictures:
    names = [f"{name}/{index:05d}" for index in range(len(labels))]
    found = splits.choose_split(names, [classes[label] for label in labels], None, data, seed)
    splits.check_splits(classes, labels, found, f"data={name}")
    return Pictures(classes, names, labels, found, read, in_memory=True)


def _digits() -> tuple[str, tuple[str, ...], list[int], Callable[[int], torch.Tensor]]:
    """scikit-learn's digits: 8x8, 17 levels of grey (UCI Optical Recognition of Handwritten Digits)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    return "digits", tuple(map(str, digits.target_names)), digits.target.tolist(), partial(_grey_picture, grey)


def _grey_picture(grey: torch.Tensor, index: int) -> torch.Tensor:
    return grey[index].expand(3, -1, -1)


def _synthetic(data: Data, seed: int) -> tuple[str, tuple[str, ...], list[int], Callable[[int], torch.Tensor]]:
    from src.data.synthetic import draw

    num_classes = data.num_classes or 3
    labels = [index % num_classes for index in range(data.num_pictures or 240)]
    classes = tuple(f"class{label}" for label in range(num_classes))
    return "synthetic", classes, labels, partial(draw, seed, num_classes)
