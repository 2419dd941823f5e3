"""Features on the disk: a folder for all that were computed in the same way, where an image is known by its content. The image
bank (src/engine/images/image_bank.py) keeps its pixels in such files too.

A file is written once, as a whole, and never changed, and every row has a checksum. So a kill, a full disk or a second writer
loses nothing but time: what cannot be read is computed again.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from src.engine.runs.files import remove_leftovers, write_atomically

log = logging.getLogger(__name__)

FOLDER = ".features"  # in runs_dir
GIB = 2**30


class Records:
    """Rows of one kind. folder: theirs; None: nothing is kept on the disk. what: they are; files begin with it."""

    def __init__(self, folder: Path | None, what: str = "features") -> None:
        self.folder, self.what = folder, what

    def files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.what}-*.safetensors")) if self.folder else []

    def load(self, names: Sequence[str]) -> tuple[list[int], Tensor | None]:
        """The places in `names` of the images whose rows are on the disk, and these rows (places, F)."""
        if self.folder is None or not self.folder.is_dir():
            return [], None
        with suppress(OSError):
            os.utime(self.folder)  # what was used last is removed last
        places_of: defaultdict[str, list[int]] = defaultdict(list)  # copies of an image have one name
        for place, name in enumerate(names):
            places_of[name].append(place)
        places: list[int] = []
        rows: list[Tensor] = []
        for path in self.files():
            own_names, own_rows, sums = _read(path)
            found = [(place, number) for number, name in enumerate(own_names) for place in places_of.pop(name, ())]
            damaged = {number for place, number in found if checksum(names[place], own_rows[number]) != sums[number]}
            if damaged:
                log.warning(f"{path}: {len(damaged)} features are damaged; they are computed again.")
                path.unlink(missing_ok=True)
            kept = [(place, number) for place, number in found if number not in damaged]
            places += [place for place, _ in kept]
            rows.append(own_rows[[number for _, number in kept]])
        return places, torch.cat([part for part in rows if len(part)]) if places else None

    def add(self, names: Sequence[str], rows: Tensor) -> None:
        """Keeps the rows (names, F). A disk that does not take them is no reason to stop, and said once."""
        rows = rows.cpu().contiguous()
        sums = torch.tensor([checksum(name, row) for name, row in zip(names, rows, strict=True)])
        self.write(names, {"rows": rows, "checksums": sums})

    def write(self, names: Sequence[str], tensors: dict[str, Tensor]) -> Path | None:
        """The new file, or None."""
        if self.folder is None or not names:
            return None
        content = save(tensors, {"names": "\n".join(names)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.what}-{uuid.uuid4().hex[:12]}.safetensors"
            write_atomically(path, lambda file: file.write(content))
        except OSError as error:
            log.warning(f"{self.what.capitalize()} cannot be kept for later runs: {error}")
            self.folder = None
            return None
        return path


def _read(path: Path) -> tuple[list[str], Tensor, list[int]]:
    """Names, rows and checksums of a file; of one that cannot be read none, and it is removed."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.metadata()["names"].split("\n")
        tensors = load_file(path)
        rows, sums = tensors["rows"], tensors["checksums"].tolist()
        if rows.ndim == 2 and len(rows) == len(names) == len(sums):
            return names, rows, sums
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        pass
    log.warning(f"{path} is damaged; its features are computed again.")
    with suppress(OSError):
        path.unlink()
    return [], torch.empty(0, 0), []


def checksum(name: str, row: Tensor) -> int:
    return zlib.crc32(row.view(torch.uint8).numpy().data, zlib.crc32(f"{name} {row.dtype} {len(row)}".encode()))


def trim(root: Path, limit_gib: float) -> None:
    """Removes the kinds that were used longest ago, until the rest takes no more than limit_gib."""
    kinds = []
    for folder in root.glob("*/"):
        with suppress(OSError):  # another process removes it
            remove_leftovers(folder)
            size = sum(path.stat().st_size for path in folder.iterdir())
            kinds.append((folder.stat().st_mtime, size, folder))
    total = 0
    for _, size, folder in sorted(kinds, reverse=True):
        total += size
        if total > limit_gib * GIB:
            shutil.rmtree(folder, ignore_errors=True)
