"""Splits into train, val and test: made by a seed, or read from a split.csv, and checked.

A split is stratified: each class is shuffled by (seed, class name) alone and dealt out, so adding a class leaves the
split of the others as it was.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from src.engine.commands.user_command import corrected
from src.engine.images.groups import Together
from src.engine.images.label_split import split_sizes
from src.engine.images.labelled_images import SPLITS, LabelledImages, by_split
from src.engine.images.spelling import alike
from src.engine.images.table import known_split, read_csv, relative, spellings
from src.engine.runs import seeding
from src.engine.runs.errors import UserError, data_error
from src.engine.runs.text import few, printable, shell_word

if TYPE_CHECKING:
    from src.engine.steps.task_kind import TaskKind

log = logging.getLogger(__name__)


ALONE = Together()


@dataclass(frozen=True)
class SplitSettings:
    seed: int
    val_fraction: float  # share of each class
    test_fraction: float
    file: Path | None = None  # a split.csv to follow
    root: Path = Path()  # where its paths start
    split_seed: int | None = None  # in place of seed
    group: str | None = None  # data.group
    folds: int | None = None  # as many parts, of which the part `fold` is the test split
    fold: int | None = None


def choose_split(
    names: list[str],
    labels: list[str],
    stated: Sequence[str] | None,
    settings: SplitSettings,
    together: Together = ALONE,
    kind: TaskKind | None = None,
) -> dict[str, list[int]]:
    """split -> indices: by the settings' file, as the data states it with a val split made of train, or dealt out.

    together: which images are in one split at any rate. kind: None: of classes.
    """
    deal = kind.split if kind else stratified_split
    val_fraction = settings.val_fraction
    seed = settings.seed if settings.split_seed is None else settings.split_seed
    if settings.file is not None:
        return _by_file(names, labels, settings, kind)
    if settings.folds is not None and settings.fold is not None:
        members = _fold(len(labels), together.folds(labels, seed, settings.folds)[settings.fold])
    elif stated is None:
        return together.deal(deal, labels, seed, val_fraction, settings.test_fraction)
    else:
        members = by_split(stated)
    if not members["val"] and members["train"]:
        train = members["train"]
        dealt = together.only(train).deal(deal, [labels[index] for index in train], seed, val_fraction, 0.0)
        members["train"], members["val"] = ([train[i] for i in dealt[part]] for part in ("train", "val"))
        if settings.folds is None:
            log.info(f"There is no val split: {len(members['val'])} training images are held out for it.")
    elif settings.split_seed is not None:
        log.warning(f"data.split_seed={settings.split_seed} has no effect: the data states its splits.")
    return members


def _fold(count: int, test: list[int]) -> dict[str, list[int]]:
    rest = {*range(count)}.difference(test)
    return {"train": sorted(rest), "val": [], "test": test}


def check_folds(stated: Sequence[str] | None, settings: SplitSettings, where: str) -> None:
    """Raises UserError for folds of a set that states its split, and for all folds at once."""
    if settings.folds is None:
        return
    if settings.fold is None:  # a trial of another program's sweep
        found, why = f"data.folds={settings.folds} without data.fold is no single run", "only src.train runs all folds"
        raise UserError(found, where="data.folds", why=why, fix=corrected("data.fold=0"))
    if stated is not None:
        raise data_error(
            f"data.folds={settings.folds} makes the splits, and the data states its own",
            where=printable(where),
            why="each fold is the test split of one run; the column split, or the folders train/ and test/, say another",
            fix=[
                "data.root=.../train trains on the folds of one folder; of a table, leave the column split out",
                corrected(remove=["data.fold", "data.folds"]) + "   # one run, with the split that is there",
            ],
        )


SplitRows = dict[str, tuple[str, str | None]]


def _by_file(
    names: list[str], labels: list[str], settings: SplitSettings, kind: TaskKind | None
) -> dict[str, list[int]]:
    assert settings.file is not None
    path, root = settings.file, settings.root
    rows = read_split_file(path)
    stated, absent = _as_in_the_data(rows, names, path, root)
    unlisted = [name for name in names if name not in stated]
    on_disk = {alike(name): name for name in unlisted}
    if confused := [(name, on_disk[alike(name)]) for name in absent if alike(name) in on_disk]:
        raise data_error(
            f"{len(confused)} paths differ from the data's only in case, blanks or Unicode form",
            where=printable(path),
            why="\n".join(f"{name!a}, while the data has {other!a}" for name, other in confused[:5]),
            fix=f"write them in {shell_word(path)} as the files are named",
        )
    if not stated:
        found = f"none of the {len(absent)} images of the split file is in the data"
        why = f"it lists {printable(absent[0])}, the data has {printable(names[0])}"
        raise data_error(found, where=printable(path), why=why, fix=f"head -3 {shell_word(path)}")
    members: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        if name in stated:
            split, stated_label = stated[name]
            if stated_label is not None and stated_label.strip() != label.strip():
                raise _other_label(name, label, stated_label, path)
            members[split].append(index)
    words = kind.words if kind else list
    if lost := {*words(_labels(rows[name] for name in absent))} - {*words(_labels(stated.values()))}:
        gone = [name for name in absent if lost & {*words(_labels([rows[name]]))}]
        found = f"no image of {_classes(sorted(lost))} is left, of {len(gone)} that the split file lists"
        why = f"without them the network would have other classes; gone: {few(gone, 3)}"
        raise data_error(found, where=printable(path), why=why, fix=f"ls {shell_word(root)}")
    if absent:
        log.warning(f"{len(absent)} of {len(rows)} images that {path} lists are gone: {few(absent, 3)}")
    if unlisted:
        log.warning(
            f"{len(unlisted)} of {len(names)} images are left out, since {path} does not list them: {few(unlisted, 3)}"
        )
    return members


def _labels(rows: Iterable[tuple[str, str | None]]) -> list[str]:
    return [label for _, label in rows if label is not None]


def _as_in_the_data(rows: SplitRows, names: list[str], file: Path, root: Path) -> tuple[SplitRows, list[str]]:
    """The rows by the name that the data has for the image, and the paths for which it has none."""
    existing = set(names)
    stated, absent = {}, []
    for path, row in rows.items():
        name = next((form for form in (relative(form, root) for form in spellings(path)) if form in existing), None)
        if name is None:
            absent.append(path)
        elif stated.setdefault(name, row) != row:
            raise _listed_twice(path, printable(file))
    return stated, sorted(absent)


def _other_label(name: str, label: str, stated: str, path: Path) -> UserError:
    shown = [ascii(text) if alike(stated) == alike(label) else printable(text) for text in (label, stated)]
    found = f"{printable(name)} is of class {shown[0]} here and of class {shown[1]} in the split file"
    why = "the split file was made for other labels"
    return data_error(found, where=printable(path), why=why, fix=f"grep -n {shell_word(name)} {shell_word(path)}")


def stratified_split(
    labels: Sequence[str], seed: int, val_fraction: float, test_fraction: float, digests: Sequence[str] | None = None
) -> dict[str, list[int]]:
    """Indices of train, val and test, in rising order; every class gets its share of each split.

    A class with enough images to train on (3 or more) has at least one in val and, where a test split is asked for,
    one in test, whatever the fractions round to. Images of a class with the same digest count as one, and go to one
    split together.
    """
    members: defaultdict[str, dict[int | str, list[int]]] = defaultdict(dict)
    for index, label in enumerate(labels):
        members[label].setdefault(digests[index] or index if digests else index, []).append(index)
    splits: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label, copies in members.items():
        groups = list(copies.values())
        order = [groups[i] for i in seeding.split_order(seed, label, len(groups))]
        start = 0
        for split, size in split_sizes(len(order), val_fraction, test_fraction).items():
            splits[split] += [index for group in order[start : start + size] for index in group]
            start += size
    return {split: sorted(indices) for split, indices in splits.items()}


def read_split_file(path: Path) -> SplitRows:
    """{image: (split, label or None)} of a CSV with the columns path, split and optionally label. Raises UserError."""
    found: SplitRows = {}
    for line, row in read_csv(path, ("path", "split"), ours=True):
        stated = known_split(row["split"], path, line), row.get("label") or None
        if found.setdefault(row["path"], stated) != stated:
            raise _listed_twice(row["path"], f"{printable(path)}, line {line}")
    return found


def _listed_twice(name: str, where: str) -> UserError:
    found = f"{printable(name)} stands twice, in two splits or with two labels"
    why = "an image belongs to one split and has one label; ./a.jpg and a.jpg are the same image"
    return data_error(found, where=where, why=why, fix="keep one of its lines in the split file")


def bits_of_run(path: Path) -> int:
    """How many bits the run of this split.csv reads of 16-bit channels: all, where it is older than the column."""
    stated = read_csv(path, ("path", "split"))[0][1].get("bits", "")
    return int(stated) if stated.isdigit() else 16


def groups_of_run(path: Path, names: Sequence[str]) -> list[str] | None:
    """The groups of a run's images as its split.csv has them; None of a run without groups, or one older than the column."""
    group_of = {
        row["path"]: row["group"] for _, row in read_csv(path, ("path", "split"), ours=True) if row.get("group")
    }
    return [group_of[name] for name in names] if group_of.keys() >= {*names} else None


def check_splits(images: LabelledImages, where: str) -> None:
    """Refuses data that cannot be trained on, naming the classes: too few classes, or one missing from a split."""
    classes, splits = images.classes, images.splits
    if len(classes) < 2:
        raise data_error(
            f"there is only one class: {printable(classes[0])}" if classes else "there are no classes",
            where=printable(where),
            why="a classifier needs at least two classes; each is a folder of images with the class's name",
            fix=corrected("data=image_folder", "data.root=photos/") + "   # photos/cats/1.jpg, photos/dogs/1.jpg, ...",
        )
    for split in SPLITS:
        if split == "test" and not splits["test"]:
            continue  # a test split is not required; the report says that there is none
        counts = images.counts(split)
        if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
            raise data_error(
                f"{_classes(missing)} {'has' if len(missing) == 1 else 'have'} no image in the {split} split",
                where=printable(where),
                why=f"{'it could not be learned' if split == 'train' else 'its accuracy could not be measured'}; "
                "a class needs at least 3 images (copies of a file, or a group, count as one), or one in each of train/ and "
                "val/ where these folders exist",
                fix=[f"add images of {printable(missing[0])}, or remove the class", f"ls {shell_word(where)}"],
            )


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {few(names)}"
