"""Names that look the same and are not: other case, blanks, or another Unicode form of the same letters.

A class named `Cats` in train/ and `cats` in val/, or a label typed with a blank too many, is one mistake. Folders,
tables and split files ask here.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from src.engine.runs.errors import data_error


def alike(name: str) -> str:
    """The same text for names that differ only in case, blanks, invisible characters or Unicode form (NFC, NFD)."""
    seen = "".join(letter for letter in name if unicodedata.category(letter) not in ("Cf", "Cc") or letter.isspace())
    return unicodedata.normalize("NFC", " ".join(unicodedata.normalize("NFC", seen).lower().split()))


def refuse_alike(names: Iterable[str], where: Path, fix: str) -> None:
    """Raises UserError for class names of which two differ only in how they are written: both are shown with escapes."""
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for name in set(names):
        groups[alike(name)].add(name)
    if shown := [" and ".join(map(ascii, sorted(group))) for group in groups.values() if len(group) > 1]:
        found = f"class names that differ only in case, blanks or Unicode form: {shown[0]}"
        why = "\n".join(["each would be a class of its own", *shown[1:6]])
        raise data_error(found, where=where, why=why, fix=fix)
