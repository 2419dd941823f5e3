"""The image bank: decoded images on the disk, so that epochs, later runs, folds and the trials of a sweep decode nothing.

The check (checking.py) decodes every image anyway, and hands it to the bank; the loaders ask it before they open a file
(image_files.py). Kept is what reading.pixels_of gives, so a run's result is the same with and without the bank. An image is
known by the content of its file. The files are those of the feature bank: written once, as a whole, with a checksum for each
image. They are read with ordinary calls and not mapped: both ways processes share the system's cache, but where a mapped file
is cut off or its disk fails, SIGBUS ends the process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import safetensors
import torch
from PIL import Image
from torch import Tensor

from src.engine.feature_bank.records import GIB, Records, checksum, trim
from src.engine.images.formats import DECODER
from src.engine.images.reading import pixel_rows
from src.engine.memory.memory import MIB, available_bytes
from src.engine.runs.errors import UserError
from src.engine.runs.files import locked
from src.engine.runs.reading import MOST_OF_A_HEADER
from src.engine.weights.preprocessing import ReadOptions

if TYPE_CHECKING:
    from src.engine.images.checking import CheckResult

log = logging.getLogger(__name__)

FOLDER = ".images"  # in runs_dir
VERSION = 1  # of what is kept
CHUNK = 32 * MIB  # pixels after which a file is written
SMALLEST = 128 * 128  # pixels: to decode less costs no more than the rest of the loader's work
LARGEST = CHUNK // 3  # pixels: of larger images the check's threads would hold copies


class Place(NamedTuple):
    """Where the pixels of an image lie: (height, width, 3) bytes. number: of the image in the bank."""

    path: Path
    offset: int
    height: int
    width: int
    checksum: int
    number: int


class ImageBank:
    """Of the files below one root that are read with the same options. Images with 16-bit channels are not kept, because how
    they are read depends on the others (ReadOptions.bits), nor are small and very large ones."""

    def __init__(self, root: Path, listed: Path, options: ReadOptions, limit_mib: float) -> None:
        """root: the folder of all banks. listed: the folder that images are listed from."""
        made_with = [VERSION, DECODER, str(listed.resolve()), options.background, options.max_megapixels]
        made_with += [options.keep_side] if options.keep_side else []
        digest = hashlib.blake2b(json.dumps(made_with).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        self.folder, self.options, self.limit_mib = root / digest, options, limit_mib
        self.places: dict[str, Place] = {}  # digest of an image's file -> where its pixels are
        self._reopen()

    def read(self, digest: str) -> Tensor | None:
        """uint8 (3, height, width), or None for an image that the bank has not, or not any more."""
        place = self.places.get(digest)
        if place is None:
            return None
        try:
            pixels = np.fromfile(place.path, np.uint8, 3 * place.height * place.width, offset=place.offset)
            rows = torch.from_numpy(pixels).view(place.height, place.width, 3)
            if not self._intact[place.number] and _checksum(digest, rows) != place.checksum:
                raise ValueError
        except FileNotFoundError:  # the folder may be deleted at any time
            self._forget(place.path)
            return None
        except (OSError, ValueError, RuntimeError):  # RuntimeError: of view, where the file ends too early
            self._discard(place.path)
            return None
        self._intact[place.number] = 1
        return rows.permute(2, 0, 1)

    @contextmanager
    def filling(self) -> Iterator[Filling]:
        """For the check, by one process at a time: another one decodes for itself in this run."""
        filling = Filling(self)
        with ExitStack() as stack:
            with suppress(UserError, OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder / "lock", UserError("another run fills the bank")))
                filling.begin()
            try:
                yield filling
            finally:  # Ctrl-C too
                filling.end()
        self._reopen()

    def _reopen(self) -> None:
        self.places.clear()
        number = 0
        for path in Records(self.folder, "images").files():
            try:
                found = _places(path, number)
                self.places |= found
                number += len(found)
            except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
                self._discard(path)
        # Checksums are looked at once in a run, by the first of its processes that reads the image.
        self._intact = torch.zeros(number + 1, dtype=torch.uint8).share_memory_()

    def _discard(self, path: Path) -> None:
        log.warning(f"{path} is damaged; its images are decoded again.")
        with suppress(OSError):
            path.unlink()
        self._forget(path)

    def _forget(self, path: Path) -> None:
        for digest in [digest for digest, place in self.places.items() if place.path == path]:
            del self.places[digest]


class Filling:
    """What the check's threads put into the bank. Nothing before begin()."""

    def __init__(self, bank: ImageBank) -> None:
        self.bank, self.records = bank, Records(bank.folder, "images")
        self.free = 0  # bytes that may still be written
        self.added = self.refused = 0  # images; refused: there was no room
        self._lock = threading.Lock()
        self._waiting: dict[str, Tensor] = {}  # digest -> pixels (height, width, 3)

    def begin(self) -> None:
        """Half of the free disk is left to checkpoints, half of the memory to training: what no cache holds is read slowly."""
        own = sum(path.stat().st_size for path in self.records.files())
        disk = shutil.disk_usage(self.bank.folder).free // 2
        memory = available_bytes(torch.device("cpu"))
        self.free = int(min(self.bank.limit_mib * MIB - own, disk, disk if memory is None else memory // 2))

    def wanted(self, checked: Mapping[str, CheckResult]) -> set[str]:
        """Of images that were checked by an earlier run those to decode for the bank: for which there is room."""
        room, names = self.free, set()
        for name, result in checked.items():
            room -= (nbytes := self._nbytes(result))
            if nbytes and room >= 0:
                names.add(name)
        return names

    def add(self, result: CheckResult, image: Image.Image | None) -> None:
        nbytes = self._nbytes(result)
        if self.free <= 0 or image is None or not nbytes:
            return
        rows = pixel_rows(image)
        with self._lock:
            if nbytes > self.free:
                self.refused += 1
            elif result.digest not in self._waiting:
                self.free -= nbytes
                self._waiting[result.digest] = rows
                if sum(rows.nbytes for rows in self._waiting.values()) >= CHUNK:
                    self._write()

    def end(self) -> None:
        self._write()
        if self.added:
            trim(self.bank.folder.parent, self.bank.limit_mib * MIB / GIB)
            log.info(f"image bank: {self.added} decoded images are kept for later epochs and runs (docs/data.md)")
        if self.refused:
            log.info(f"image bank: no room for {self.refused} images (data.cache_mib={self.bank.limit_mib:g})")

    def _nbytes(self, result: CheckResult) -> int:
        """Of an image that the bank lacks; else 0."""
        kept = result.digest in self.bank.places or result.digest in self._waiting
        shrink = self.bank.options.shrink_of(result.width, result.height)
        pixels = (result.width // shrink) * (result.height // shrink)  # a decoder rounds up
        return 0 if kept or result.bits or not SMALLEST <= pixels <= LARGEST else 3 * pixels

    def _write(self) -> None:
        names, parts = [*self._waiting], [*self._waiting.values()]
        self._waiting = {}
        if not names:
            return
        sums = torch.tensor([_checksum(name, rows) for name, rows in zip(names, parts, strict=True)])
        sizes = torch.tensor([rows.shape[:2] for rows in parts])
        pixels = torch.cat([rows.flatten() for rows in parts])
        if path := self.records.write(names, {"pixels": pixels, "sizes": sizes, "checksums": sums}):
            self.bank.places |= _places(path, len(self.bank.places))
            self.added += len(names)
        else:
            self.free = 0


def _places(path: Path, number: int) -> dict[str, Place]:
    """What a file has. number: of its first image. Raises ValueError and others for one that is damaged."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_OF_A_HEADER:
            raise ValueError
        start, end = json.loads(file.read(length))["pixels"]["data_offsets"]
    with safetensors.safe_open(path, "pt") as file:
        names = file.metadata()["names"].split("\n")
        sizes, sums = file.get_tensor("sizes").tolist(), file.get_tensor("checksums").tolist()
    places, offset = {}, 8 + length + start
    for name, (height, width), total in zip(names, sizes, sums, strict=True):
        places[name] = Place(path, offset, height, width, total, number + len(places))
        offset += 3 * height * width
    if offset != 8 + length + end or min(map(min, sizes)) < 1:
        raise ValueError
    return places


def _checksum(digest: str, rows: Tensor) -> int:
    return checksum(f"{digest} {rows.shape[0]}", rows.flatten())
