"""Where images come from: data=NAME calls a function of this file.

A source is a function that gets those of data (the section of the config), root (data.root), kind (the task), seed and
run_split (the split.csv of a run that goes on, or None) which it names. It returns a `Listing` (files below a folder: a path
and a label each) or an `ImageSet` (anything else that gives an image for an index). Checks, splits, copies and the order of
loading are the same for all. Your own needs no entry here: data=own data.source=src.my_data.from_sqlite.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.config import Data
from src.engine.images import folders, image_files, table
from src.engine.images.image_files import FileSettings, split_image_set
from src.engine.images.labelled_images import ImageSet, LabelledImages, Listing
from src.engine.images.splits import SplitSettings
from src.engine.own import build_part, is_own
from src.engine.runs.cores import cpu_cores
from src.engine.runs.errors import ExitCode, UserError
from src.engine.steps.task_kind import TaskKind
from src.engine.weights.preprocessing import ReadOptions


def image_folder(data: Data, run_split: Path | None) -> Listing:
    """The images of the folders below data.root: one per class, perhaps in train/, val/ and test/."""
    root = image_root(data)
    try:
        return folders.list_image_folder(root, data.layout)
    except UserError as error:
        if run_split is None or error.code != ExitCode.DATA:
            raise
        return image_files.listing_of_run(root, run_split, error)


def csv_table(data: Data, kind: TaskKind) -> Listing:
    """The images of a CSV file with the columns path, label and perhaps split."""
    return table.list_table(Path(data.table or ""), image_root(data), kind, data.label_columns, data.group)


def digits() -> ImageSet:
    """scikit-learn's digits: 8x8, 17 levels of grey (UCI Optical Recognition of Handwritten Digits)."""
    from sklearn.datasets import load_digits

    images: Any = load_digits()
    grey = torch.from_numpy(np.rint(images.images * (255 / 16)).astype(np.uint8))
    return ImageSet("digits", tuple(map(str, images.target_names)), images.target.tolist(), partial(_grey_image, grey))


def _grey_image(grey: torch.Tensor, index: int) -> torch.Tensor:
    return grey[index].expand(3, -1, -1)


def synthetic(data: Data, seed: int) -> ImageSet:
    """data.num_images drawings of data.num_classes classes."""
    from src.data.synthetic import draw

    num_classes = data.num_classes or 3
    labels = [index % num_classes for index in range(data.num_images or 240)]
    classes = tuple(f"class{label}" for label in range(num_classes))
    return ImageSet("synthetic", classes, labels, partial(draw, seed, num_classes))


def torchvision_set(data: Data) -> ImageSet:
    """One of torchvision's data sets, downloaded to data.root."""
    from src.engine.images.torchvision_sets import open_torchvision_set

    return open_torchvision_set(data.name or "", Path(data.root or "data"), _background(data))


LISTINGS = {"image_folder": image_folder, "table": csv_table}
IMAGE_SETS = {"digits": digits, "synthetic": synthetic, "torchvision": torchvision_set}


def find_images(data: Data, kind: TaskKind, seed: int = 0, run_split: Path | None = None) -> Listing | ImageSet:
    """What the source of the config gives. Raises UserError."""
    given = {"data": data, "root": data.root, "kind": kind, "seed": seed, "run_split": run_split}
    return build_part("data.source", data.source, LISTINGS | IMAGE_SETS, given, data.options, (Listing, ImageSet))


def load_images(
    data: Data,
    kind: TaskKind,
    seed: int,
    *,
    cache_dir: Path,
    bad_list: Path | None = None,
    run_split: Path | None = None,
) -> LabelledImages:
    """The images of the config, checked and split. Raises UserError.

    cache_dir: remembers which files were checked. bad_list: where to list the files that failed; copies are listed beside
    it. run_split: the split.csv of a run that is continued or evaluated, which says
    for files what the run has, also where its folder would be refused today.
    """
    found = find_images(data, kind, seed, run_split)
    split_file = Path(data.split_file) if data.split_file else None
    settings = SplitSettings(seed, data.val_fraction, data.test_fraction, split_file)
    settings = replace(settings, split_seed=data.split_seed, group=data.group, folds=data.folds, fold=data.fold)
    if isinstance(found, ImageSet):
        return split_image_set(found, kind, settings)
    settings = replace(settings, file=run_split or split_file, root=found.root)
    return image_files.load(found, kind, settings, _file_settings(data, cache_dir, bad_list), run_split)


def load_unsplit(data: Data, kind: TaskKind, *, cache_dir: Path) -> LabelledImages:
    """Files to evaluate on, as the test split: the files of test/ where the data states a split, otherwise all files."""
    listing = find_images(data, kind)
    assert isinstance(listing, Listing), "the caller asks lists_files"
    return image_files.load_unsplit(listing, kind, _file_settings(data, cache_dir, None), data.group)


def lists_files(data: Data, kind: TaskKind) -> bool:
    """Whether the images are files below `image_root`, which are checked before training."""
    return data.source in LISTINGS or (is_own(data.source) and isinstance(find_images(data, kind), Listing))


def image_root(data: Data, kind: TaskKind | None = None) -> Path:
    """The folder that the paths of a listing start from. kind: needed for an own source."""
    if kind and is_own(data.source) and isinstance(listing := find_images(data, kind), Listing):
        return listing.root
    return Path(data.root or Path(data.table or "").parent)


def _file_settings(data: Data, cache_dir: Path, bad_list: Path | None) -> FileSettings:
    return FileSettings(
        options=ReadOptions(_background(data), data.max_megapixels, keep_side=data.keep_side or 0),
        bits=data.bits,
        timeout_seconds=data.timeout_seconds,
        skip_bad=data.on_bad_image == "skip",
        cache_dir=cache_dir,
        bad_list=bad_list,
        workers=cpu_cores(),
        columns=data.label_columns,
        bank_mib=data.cache_mib if data.image_bank == "auto" else 0,
    )


def _background(data: Data) -> tuple[int, int, int]:
    red, green, blue = data.background
    return red, green, blue
