"""Finds the pictures of data=image_folder and data=table, without opening one.

A folder per class, sorted by name; sub-folders train/, val/ and test/ where they exist. What is not read is counted and said.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from src.data.reading import EXTENSIONS
from src.data.splits import SPLIT_WORDS, known_split, read_csv
from src.errors import ExitCode, UserError

log = logging.getLogger(__name__)


@dataclass
class Listing:
    """What was found: one entry per picture, in a fixed order."""

    root: Path
    names: list[str] = field(default_factory=list)  # paths relative to root, with forward slashes
    labels: list[str] = field(default_factory=list)  # class names
    splits: list[str] | None = None  # train, val or test of each picture, where the data says so

    def only(self, indices: list[int]) -> Listing:
        """The listing of these pictures alone."""
        splits = None if self.splits is None else [self.splits[index] for index in indices]
        return Listing(self.root, [self.names[i] for i in indices], [self.labels[i] for i in indices], splits)


def list_image_folder(root: Path) -> Listing:
    """The pictures below root: root/CLASS/..., or root/train/CLASS/..., root/val/CLASS/... and root/test/CLASS/....

    Raises UserError for a root that is no folder, holds no picture, or has a class folder without one.
    """
    if not root.is_dir():
        raise UserError(
            f"data.root={root} is not a folder",
            where=str(root.absolute()),
            why="data=image_folder reads one sub-folder per class",
            fix=f"ls {root.parent}",
            code=ExitCode.NO_INPUT,
        )
    top = _sub_folders(root)
    parts = {name: SPLIT_WORDS[name.lower()] for name in top if name.lower() in SPLIT_WORDS}
    has_parts = "train" in parts.values() and len(parts) > 1 and all(_sub_folders(root / name) for name in parts)
    listing = Listing(root, splits=[] if has_parts else None)
    skipped: Counter[str] = Counter()
    empty: list[str] = []
    for part, split in parts.items() if has_parts else [("", "")]:
        for label in _sub_folders(root / part):
            found = _pictures_below(root / part / label, skipped)
            if not found:
                empty.append(str(root / part / label))
            for path in found:
                listing.names.append(path.relative_to(root).as_posix())
                listing.labels.append(label)
                if listing.splits is not None:
                    listing.splits.append(split)
    if skipped:
        kinds = ", ".join(f"{count} {ending}" for ending, count in skipped.most_common(6))
        log.warning(
            f"{sum(skipped.values())} files in {root} are not pictures that are read and were left out: {kinds}"
        )
    if has_parts and (others := [name for name in top if name not in parts]):
        log.warning(f"{root} has train/ and val/ or test/ folders, so these were left out: {', '.join(others[:6])}")
    if not listing.names:
        raise UserError(
            f"no picture was found in {root}",
            where=str(root.absolute()),
            why=f"expected one folder per class with files ending in {', '.join(sorted(EXTENSIONS))}",
            fix=f"find {root} -type f | head",
            code=ExitCode.DATA,
        )
    if empty:
        raise UserError(
            f"{len(empty)} class folder{'s have' if len(empty) > 1 else ' has'} no picture: {', '.join(empty[:5])}",
            where=str(root.absolute()),
            why="a class without pictures cannot be learned; its number would be in the model all the same",
            fix=[f"rmdir {empty[0]}", "or put pictures into it"],
            code=ExitCode.DATA,
        )
    return listing


def list_table(table: Path, root: Path | None) -> Listing:
    """The pictures of a CSV file with the columns path,label and optionally split. Paths start from root."""
    rows = read_csv(table, ("path", "label"))
    root = root or table.parent
    listing = Listing(root, splits=[] if "split" in rows[0] else None)
    missing = []
    for line, row in enumerate(rows, start=2):
        if not (row["path"] and row["label"]):
            raise UserError(
                "a row without a path or a label",
                where=f"{table}, line {line}",
                why="every picture needs both",
                fix=f"sed -n {line}p {table}",
                code=ExitCode.DATA,
            )
        if not (root / row["path"]).is_file():
            missing.append(f"line {line}: {row['path']}")
        listing.names.append(row["path"])
        listing.labels.append(row["label"])
        if listing.splits is not None:
            listing.splits.append(known_split(row["split"] or "", table, line))
    if missing:
        raise UserError(
            f"{len(missing)} of {len(rows)} pictures in {table} do not exist",
            where=f"below {root.absolute()}",
            why="\n".join(missing[:5] + [f"and {len(missing) - 5} more"] * (len(missing) > 5)),
            fix=f"python -m src.train data=table data.table={table} data.root=FOLDER_THE_PATHS_START_FROM",
            code=ExitCode.NO_INPUT,
        )
    twice = [name for name, count in Counter(listing.names).items() if count > 1]
    if twice:
        raise UserError(
            f"{len(twice)} pictures stand twice in {table}: {', '.join(twice[:3])}",
            where=str(table.absolute()),
            why="with two labels or in two splits a picture would spoil the result",
            fix=f"grep -n '{twice[0]}' {table}",
            code=ExitCode.DATA,
        )
    return listing


def list_pictures(path: Path) -> list[Path]:
    """Every picture below a folder, or the one file; for predict."""
    skipped: Counter[str] = Counter()
    found = [path] if path.is_file() else _pictures_below(path, skipped)
    if skipped:
        log.warning(f"{sum(skipped.values())} files are not pictures that are read and were left out")
    return found


def _sub_folders(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith((".", "__"))
    )


def _pictures_below(folder: Path, skipped: Counter[str]) -> list[Path]:
    """Sorted pictures below a folder; hidden files and folders are passed over, links are followed but never in a circle."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def walk(current: Path) -> None:
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(current), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                walk(Path(entry.path))
            elif Path(entry.name).suffix.lower() in EXTENSIONS:
                found.append(Path(entry.path))
            else:
                skipped[Path(entry.name).suffix.lower() or "without an ending"] += 1

    walk(folder)
    return found
