"""Who is trained on and who is held out: made by a seed, or read from a split.csv, and checked.

A split is stratified: each class is shuffled by (seed, class name) alone and dealt out, so adding a class leaves the
split of the others as it was.
"""

from __future__ import annotations

import csv
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from src import seeding
from src.config import Data
from src.data.pictures import SPLITS
from src.errors import ExitCode, UserError

log = logging.getLogger(__name__)

# What folders and CSV files call the splits.
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def choose_split(
    names: list[str], labels: list[str], given: Sequence[str] | None, data: Data, seed: int
) -> dict[str, list[int]]:
    """The split the data states, the one of data.split_file, or a stratified one; what is missing of the first is dealt."""
    if data.split_file is not None:
        return _by_file(names, labels, Path(data.split_file), data)
    if given is None:
        return stratified_split(labels, seed, data.val_fraction, data.test_fraction)
    found = {split: [index for index, own in enumerate(given) if own == split] for split in SPLITS}
    if not found["val"] and found["train"]:
        train = found["train"]
        dealt = stratified_split([labels[index] for index in train], seed, data.val_fraction, 0.0)
        found["train"], found["val"] = ([train[i] for i in dealt[part]] for part in ("train", "val"))
        log.info(f"There is no val split: {len(found['val'])} training pictures are held out for it.")
    return found


def _by_file(names: list[str], labels: list[str], path: Path, data: Data) -> dict[str, list[int]]:
    stated = read_split_file(path)
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    unlisted = []
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        split, stated_label = stated.get(name, (None, None))
        if split is None:
            unlisted.append(name)
            continue
        if stated_label not in (None, label):
            raise UserError(
                f"{name} is of class {label} here and of class {stated_label} in the split file",
                where=str(path),
                why="the split file was made for other labels",
                fix=f"grep -n '{name}' {path}",
                code=ExitCode.DATA,
            )
        found[split].append(index)
    absent = sorted(set(stated) - set(names))
    if len(absent) == len(stated):
        raise UserError(
            f"none of the {len(stated)} pictures of the split file is in the data",
            where=str(path),
            why=f"it lists {absent[0]}, the data has {names[0]}",
            fix=f"head -3 {path}",
            code=ExitCode.DATA,
        )
    if absent:
        log.warning(f"{len(absent)} pictures of {path} are not in the data (any more): {', '.join(absent[:3])} ...")
    if unlisted:
        log.warning(f"{len(unlisted)} pictures are not in {path} and were left out: {', '.join(unlisted[:3])} ...")
    return found


def stratified_split(
    labels: Sequence[str], seed: int, val_fraction: float, test_fraction: float
) -> dict[str, list[int]]:
    """Indices of train, val and test, in rising order; every class gets its share of each split.

    A class with enough pictures to train on (3 or more) has at least one in val and, where a test split is asked for,
    one in test, whatever the fractions round to.
    """
    members = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    splits: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label, indices in members.items():
        order = [indices[i] for i in seeding.split_order(seed, label, len(indices))]
        test = _share(test_fraction, len(order), spare=2)
        val = _share(val_fraction, len(order) - test, spare=1, of=len(order))
        splits["test"] += order[:test]
        splits["val"] += order[test : test + val]
        splits["train"] += order[test + val :]
    return {split: sorted(indices) for split, indices in splits.items()}


def _share(fraction: float, available: int, spare: int, of: int | None = None) -> int:
    """round(fraction * of), at least one where there is one to spare, and never all that is left."""
    if fraction == 0 or available <= spare:
        return 0
    return min(max(1, round(fraction * (of or available))), available - spare)


def read_split_file(path: Path) -> dict[str, tuple[str, str | None]]:
    """{picture: (split, label or None)} of a CSV with the columns path, split and optionally label."""
    rows = read_csv(path, ("path", "split"))
    found = {}
    for line, row in enumerate(rows, start=2):
        found[row["path"]] = (known_split(row["split"], path, line), row.get("label") or None)
    return found


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that must have the columns. Raises UserError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            where=str(path.absolute()),
            why="it must be a CSV file in UTF-8 with commas",
            fix=f"head -3 {path}",
            code=ExitCode.NO_INPUT,
        ) from error
    missing = [column for column in columns if column not in (reader.fieldnames or [])]
    if missing or not rows:
        found = ", ".join(reader.fieldnames or []) or "nothing"
        raise UserError(
            f"{path} has no column {missing[0]}" if missing else f"{path} has no rows",
            where=str(path.absolute()),
            why=f"its first line must name the columns {', '.join(columns)}; it names {found}",
            fix=f"head -3 {path}",
            code=ExitCode.DATA,
        )
    return rows


def known_split(word: str, path: Path, line: int) -> str:
    """train, val or test of a word that means one of them. Raises UserError."""
    split = SPLIT_WORDS.get(word.strip().lower())
    if split is None:
        raise UserError(
            f"{word!r} is not a split",
            where=f"{path}, line {line}",
            why="the column split takes train, val or test",
            fix=f"sed -n {line}p {path}",
            code=ExitCode.DATA,
        )
    return split


def check_splits(classes: Sequence[str], labels: Sequence[int], splits: dict[str, list[int]], where: str) -> None:
    """Refuses data that cannot be trained on, naming the classes: too few classes, or one missing from a split."""
    if len(classes) < 2:
        raise UserError(
            f"there {'is only one class' if classes else 'are no classes'}{': ' + classes[0] if classes else ''}",
            where=where,
            why="a classifier needs at least two classes; each is a folder of pictures with the class's name",
            fix="python -m src.train data=image_folder data.root=photos/   # photos/cats/1.jpg, photos/dogs/1.jpg, ...",
            code=ExitCode.DATA,
        )
    for split in ("train", "val", "test"):
        if split == "test" and not splits["test"]:
            continue  # a test split is not required; the report says that there is none
        present = {labels[index] for index in splits[split]}
        missing = [name for index, name in enumerate(classes) if index not in present]
        if missing:
            raise UserError(
                f"{_some(missing)} {'has' if len(missing) == 1 else 'have'} no picture in the {split} split",
                where=where,
                why=f"{'it could not be learned' if split == 'train' else 'its accuracy could not be measured'}; "
                "a class needs at least 3 pictures, or one in each of train/ and val/ where these folders exist",
                fix=[f"add pictures of {missing[0]}, or remove the class", f"ls {where}"],
                code=ExitCode.DATA,
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return (
        f"class {shown}"
        if len(names) == 1
        else f"classes {shown}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
    )
