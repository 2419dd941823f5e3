"""Files that are equal byte for byte: with two labels or in two splits they are refused, in one split they are counted.

src/engine/images/splits.py puts the copies of an image into the same split at every seed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.engine.images.labelled_images import LabelledImages
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import write_text
from src.engine.runs.text import printable, shell_word

log = logging.getLogger(__name__)

Group = tuple[str, ...]


def refuse_copies(images: LabelledImages, root: Path, list_file: Path | None, labels_too: bool) -> None:
    """Raises UserError for equal files in two splits and, with labels_too, of two classes. Says how many others there are.

    list_file: where to list all copies that are refused.
    """
    digest_of = dict(zip(images.names, images.digests or [], strict=True))
    groups: defaultdict[str, list[str]] = defaultdict(list)
    label_of, split_of = {}, {}
    for name, label, split in images.rows():
        groups[digest_of[name] or name].append(name)
        label_of[name], split_of[name] = label, split
    copies = sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)
    if labels_too and (several := [group for group in copies if len({label_of[name] for name in group}) > 1]):
        raise _refusal(
            f"{len(several)} image{'s have' if len(several) > 1 else ' has'} two labels: files that are equal byte for byte",
            "one of the labels is wrong; delete the copy that has it",
            several,
            label_of,
            (root, list_file),
        )
    if several := [group for group in copies if len({split_of[name] for name in group}) > 1]:
        raise _refusal(
            f"{len(several)} image{'s are' if len(several) > 1 else ' is'} in more than one split, byte for byte",
            "what was trained on cannot be used to measure; of every image keep the files of one split",
            several,
            split_of,
            (root, list_file),
        )
    if copies:
        log.warning(
            f"{sum(map(len, copies))} images are copies, byte for byte, of {len(copies)} different ones; copies are in "
            "the same split, where they count more than once."
        )


def _refusal(
    found: str, why: str, groups: Sequence[Group], mark: Mapping[str, str], places: tuple[Path, Path | None]
) -> UserError:
    root, list_file = places
    shown = [" = ".join(f"{printable(name)} ({printable(mark[name])})" for name in group[:3]) for group in groups[:4]]
    if len(groups) > len(shown):
        shown.append(f"and {len(groups) - len(shown)} more")
    first, last = root / groups[0][0], root / groups[0][-1]
    fix = [f"rm {shell_word(last)}   # if it is not {printable(mark[groups[0][-1]])}, and likewise for the rest"]
    if first.samefile(last):  # removing it would remove both
        fix = [f"ls -ld {shell_word(first.parent)} {shell_word(last.parent)}   # a link: remove the link"]
    if list_file and _write(list_file, groups, mark):
        fix.append(f"less {shell_word(list_file)}   # lists all of them")
    return UserError(found, where=printable(root), why="\n".join([why, *shown]), fix=fix, code=ExitCode.DATA)


def _write(list_file: Path, groups: Sequence[Group], mark: Mapping[str, str]) -> bool:
    """One 'label or split TAB path' per line, an empty line between the groups."""
    text = "\n".join("".join(f"{printable(mark[name])}\t{printable(name)}\n" for name in group) for group in groups)
    try:
        list_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(list_file, text)
    except OSError as error:
        log.warning("the list of copies cannot be written: %s", error)
        return False
    return True
