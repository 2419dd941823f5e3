"""Files that are equal byte for byte: with two labels or in two splits they are refused, in one split they are counted, and
evaluate recognises by them the images that the run has learned from.

src/engine/images/splits.py puts the copies of an image into the same split at every seed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.engine.images.checking import cache_file, cached_digests, digest_of, write_or_warn
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.reading import ImageError, read_bytes
from src.engine.images.table import read_csv
from src.engine.runs.errors import UserError, data_error
from src.engine.runs.text import printable, shell_word

log = logging.getLogger(__name__)

Group = tuple[str, ...]


def refuse_copies(images: LabelledImages, list_file: Path | None, labels_too: bool) -> None:
    """Raises UserError for equal files in two splits and, with labels_too, of two classes. Says how many others there are.

    list_file: where to list all copies that are refused.
    """
    digest_of_name = dict(zip(images.names, images.digests or [], strict=True))
    groups: defaultdict[str, list[str]] = defaultdict(list)
    label_of, split_of = {}, {}
    for name, label, split in images.rows():
        groups[digest_of_name[name] or name].append(name)
        label_of[name], split_of[name] = label, split
    copies = sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)
    if labels_too and (several := [group for group in copies if len({label_of[name] for name in group}) > 1]):
        number = "1 image has" if len(several) == 1 else f"{len(several)} images have"
        found = f"{number} two labels: files that are equal byte for byte"
        raise _refusal(
            found, "one of the labels is wrong; delete the copy that has it", several, label_of, images.root, list_file
        )
    if several := [group for group in copies if len({split_of[name] for name in group}) > 1]:
        number = "1 image is" if len(several) == 1 else f"{len(several)} images are"
        why = "what was trained on cannot be used to measure; of every image keep the files of one split"
        found = f"{number} in more than one split, byte for byte"
        raise _refusal(found, why, several, split_of, images.root, list_file)
    if copies:
        log.warning(
            f"{sum(map(len, copies))} images are copies, byte for byte, of {len(copies)} different ones; copies are in "
            "the same split, where they count more than once."
        )


def _refusal(
    found: str, why: str, groups: Sequence[Group], mark: Mapping[str, str], root: Path | None, list_file: Path | None
) -> UserError:
    """mark: the label or split of each name. list_file gets one 'mark TAB path' per line, an empty line between groups."""
    shown = [" = ".join(f"{printable(name)} ({printable(mark[name])})" for name in group[:3]) for group in groups[:4]]
    if len(groups) > len(shown):
        shown.append(f"and {len(groups) - len(shown)} more")
    first, last = (root or Path()) / groups[0][0], (root or Path()) / groups[0][-1]
    fix = [f"rm {shell_word(last)}   # if it is not {printable(mark[groups[0][-1]])}, and likewise for the rest"]
    if root is None:
        fix = ["have your source leave the wrong ones out"]
    elif first.samefile(last):  # removing it would remove both
        fix = [f"ls -ld {shell_word(first.parent)} {shell_word(last.parent)}   # a link: remove the link"]
    text = "\n".join("".join(f"{printable(mark[name])}\t{printable(name)}\n" for name in group) for group in groups)
    if list_file and write_or_warn(list_file, text, "the list of copies cannot be written"):
        fix.append(f"less {shell_word(list_file)}   # lists all of them")
    return data_error(found, where=printable(root or "data.source"), why="\n".join([why, *shown]), fix=fix)


def seen_in_training(run: Path, config: dict[str, Any], images: LabelledImages, split: str) -> dict[str, list[int]]:
    """{"train": [...], "val": [...]}: images of the split that the run trained on, or chose its best epoch by.

    config: the run's config.yaml. Images that are measured as what they were (split=train of the run's own) do not count.
    """
    keys = images.digests or images.names
    used_as = _used_as(run, config, by_name=images.digests is None)
    return {
        part: [index for index in images.splits[split] if used_as.get(keys[index]) == part and part != split]
        for part in ("train", "val")
    }


def _used_as(run: Path, config: dict[str, Any], by_name: bool) -> dict[str, str]:
    """The split of each of the run's images, by its name or by the digest of its file."""
    rows = [row for _, row in read_csv(run / "split.csv", ("path", "split"), ours=True)]
    if by_name or all(row.get("digest") for row in rows):
        return {row["path" if by_name else "digest"]: row["split"] for row in rows}
    data = config["data"]  # an older run: its files are read, or the memory of its check
    root = Path(data.get("root") or Path(data.get("table") or "").parent)
    split_of = {}
    cached = cached_digests(cache_file(Path(config["runs_dir"]) / ".checked", root))
    for row in rows:
        try:
            split_of[digest_of(read_bytes(root / row["path"], row["path"]))] = row["split"]
        except ImageError:
            if row["path"] in cached:
                split_of[cached[row["path"]]] = row["split"]
    if unknown := len(rows) - len(split_of):
        log.warning(
            f"{run} keeps no digests, since it is older, and {unknown} of its {len(rows)} images are gone from {root}: "
            "whether they are among these is not known."
        )
    return split_of
