"""Which images of an evaluation the run was trained on: accuracy on them says little about new images.

A file is known again by the digest of its bytes, wherever it lies by now. src/engine/runs/evaluation.py asks.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from src.engine.images.checking import cached_digests
from src.engine.images.image_files import cache_file
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.table import read_csv

log = logging.getLogger(__name__)


def seen_in_training(run: Path, config: dict[str, Any], images: LabelledImages, split: str) -> dict[str, list[int]]:
    """{"train": [...], "val": [...]}: images of the split that the run trained on, or chose its best epoch by.

    config: the run's config.yaml. Images that are measured as what they were (split=train of the run's own) do not count.
    """
    seen: dict[str, list[int]] = {"train": [], "val": []}
    split_of = _used_by(run, config, by_name=images.digests is None)
    keys = images.digests or images.names
    for index in images.splits[split]:
        used_as = split_of.get(keys[index])
        if used_as in seen and used_as != split:
            seen[used_as].append(index)
    return seen


def _used_by(run: Path, config: dict[str, Any], by_name: bool) -> dict[str, str]:
    """The split of each of the run's images, by its name or by the digest of its file."""
    rows = [row for _, row in read_csv(run / "split.csv", ("path", "split"), ours=True)]
    if by_name or all(row.get("digest") for row in rows):
        return {row["path" if by_name else "digest"]: row["split"] for row in rows}
    data = config["data"]
    root = Path(data.get("root") or Path(data.get("table") or "").parent)
    cached = cached_digests(cache_file(Path(config["runs_dir"]) / ".checked", root))
    digests = {row["path"]: _digest(root / row["path"]) or cached.get(row["path"]) for row in rows}
    unknown = sum(digest is None for digest in digests.values())
    if unknown:
        log.warning(
            f"{run} keeps no digests, since it is older, and {unknown} of its {len(rows)} images are gone from {root}: "
            "whether they are among these is not known."
        )
    return {digest: row["split"] for row in rows if (digest := digests[row["path"]])}


def _digest(path: Path) -> str | None:
    """As src/engine/images/checking.py makes it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except (OSError, ValueError):
        return None
