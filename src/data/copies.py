"""Files that are equal byte for byte: with two labels or in two splits they are refused, in one split they are counted.

A split that is made here deals copies together (src/data/splits.py), whatever the seed.
"""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.data.checking import Checked, same_bytes_across
from src.data.pictures import Pictures
from src.errors import ExitCode, UserError
from src.text import printable

log = logging.getLogger(__name__)

Group = tuple[str, ...]


def refuse_two_labels(pictures: Pictures, checked: Mapping[str, Checked], where: str, list_file: Path | None) -> None:
    """Raises UserError for equal files of two classes: one of the labels is wrong. list_file: gets all of them."""
    label_of = {name: label for name, label, _ in pictures.rows()}
    groups = same_bytes_across({name: checked[name] for name in label_of}, label_of)
    if groups:
        raise _refusal(
            f"{len(groups)} picture{'s have' if len(groups) > 1 else ' has'} two labels: files that are equal byte for byte",
            "one of the labels is wrong; delete the copy that has it",
            groups,
            label_of,
            (where, list_file),
        )


def refuse_in_two_splits(
    pictures: Pictures, checked: Mapping[str, Checked], where: str, list_file: Path | None
) -> None:
    """Raises UserError for equal files in two splits, which make the numbers of the held-out one too good."""
    split_of = {name: split for name, _, split in pictures.rows()}
    groups = same_bytes_across({name: checked[name] for name in split_of}, split_of)
    if groups:
        raise _refusal(
            f"{len(groups)} picture{'s are' if len(groups) > 1 else ' is'} in more than one split, byte for byte",
            "what was trained on cannot be used to measure; of every picture keep the files of one split",
            groups,
            split_of,
            (where, list_file),
        )


def say_within_splits(pictures: Pictures) -> None:
    """Copies in one split are allowed: they count more than once there. Says how many."""
    digest_of = dict(zip(pictures.names, pictures.digests or [], strict=False))
    counts = Counter(digest_of[name] for name, _, _ in pictures.rows() if digest_of.get(name))
    groups = [count for count in counts.values() if count > 1]
    if groups:
        log.warning(
            f"{sum(groups)} pictures are copies, byte for byte: {len(groups)} different ones. Copies are in the same "
            "split, where they count more than once."
        )


def _refusal(
    found: str, why: str, groups: Sequence[Group], mark: Mapping[str, str], places: tuple[str, Path | None]
) -> UserError:
    where, list_file = places
    shown = [" = ".join(f"{printable(name)} ({printable(mark[name])})" for name in group[:3]) for group in groups[:4]]
    if len(groups) > len(shown):
        shown.append(f"and {len(groups) - len(shown)} more")
    root = Path(where) if Path(where).is_dir() else Path(where).parent
    fix = [f"rm {shlex.quote(str(root / groups[0][-1]))}   # or the other one, and likewise for the rest"]
    if list_file and _write(list_file, groups, mark):
        fix.append(f"less {shlex.quote(str(list_file))}   # lists all of them")
    return UserError(found, where=printable(where), why="\n".join([why, *shown]), fix=fix, code=ExitCode.DATA)


def _write(list_file: Path, groups: Sequence[Group], mark: Mapping[str, str]) -> bool:
    """One 'label or split TAB path' per line, an empty line between the groups."""
    text = "\n".join("".join(f"{printable(mark[name])}\t{printable(name)}\n" for name in group) for group in groups)
    try:
        list_file.parent.mkdir(parents=True, exist_ok=True)
        list_file.write_text(text, encoding="utf-8")
    except OSError as error:
        log.warning("the list of copies cannot be written: %s", error)
        return False
    return True
