"""Decodes every image in full before the first training step, in parallel, and remembers the result between runs.

src/engine/images/image_files.py calls `check_images`, then raises what `refuse_bad_images` returns, or leaves the bad
images out. A check of the headers would be cheaper but misses truncated files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from src.engine.commands.user_command import corrected
from src.engine.images.formats import DECODER
from src.engine.images.image_bank import Filling
from src.engine.images.labelled_images import Listing
from src.engine.images.near_duplicates import look_of
from src.engine.images.oddities import ONE_COLOUR
from src.engine.images.reading import ImageError, decode_image
from src.engine.images.time_limit import SECONDS, in_time
from src.engine.runs.errors import UserError, data_error
from src.engine.runs.files import write_text
from src.engine.runs.text import printable
from src.engine.weights.preprocessing import ReadOptions

CACHE_VERSION = 3
FLAT = 8  # of 255: an image whose channels vary by no more shows nothing
HANDED_OUT = 4096  # files that wait for a thread: a million would pile up
SHOWN = 8  # bad files on the screen; with them a UserError still fits its 15 lines

_KINDS = (int, int, str, int, int, str | None, int, list, str)  # of an entry of the cache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckResult:
    """One image."""

    digest: str  # of the file's bytes (blake2b, 32 hex digits); empty if they could not be read
    width: int  # upright, in pixels; 0 if there is an error
    height: int
    error: str | None
    bits: int = 0  # how many its 16-bit channels use; 0 for an image without such channels
    notes: tuple[str, ...] = ()  # what is odd about it, see src/engine/images/oddities.py
    look: str = ""  # by which near-duplicates are found: src/engine/images/near_duplicates.py


def check_images(
    listing: Listing,
    options: ReadOptions,
    cache: Path | None,
    workers: int,
    timeout_seconds: float = SECONDS,
    filling: Filling | None = None,
) -> dict[str, CheckResult]:
    """Decodes the images that have changed since they were last checked. Never raises for a bad or missing image;
    raises LoaderFault for an image that takes longer than timeout_seconds (0: no limit).

    cache: a JSON file that keeps the results of files by name, size and modification time; one file for one root.
    workers: threads (Pillow decodes outside of Python's lock). filling: of the image bank, which gets what is decoded.
    Returns the results in the order of the names.
    """
    names, root = listing.names, listing.root
    files = [] if listing.content else [root / name for name in names]
    stamps = dict(zip_longest(names, in_time(_stamp, files, timeout_seconds)))
    entries = _load(cache, options) if cache else {}
    checked = {
        name: CheckResult(*entries[name][2:7], notes=tuple(entries[name][7]), look=entries[name][8])
        for name, stamp in stamps.items()
        if stamp is not None and name in entries and tuple(entries[name][:2]) == stamp
    }

    def check(name: str) -> tuple[CheckResult, bool]:
        found = in_time(lambda _: _check(listing, name, options), [listing.location(name)], timeout_seconds)
        [(result, lasting, image)] = found
        if filling is not None:
            filling.add(result, image)
        return result, lasting

    lacking = filling.wanted(checked) if filling else ()
    missing = [name for name in stamps if name not in checked or name in lacking]
    if missing:
        columns = TextColumn("checking images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        with bar, ThreadPoolExecutor(max(1, workers)) as pool:
            parts = (missing[start : start + HANDED_OUT] for start in range(0, len(missing), HANDED_OUT))
            results = bar.track(chain.from_iterable(pool.map(check, part) for part in parts), total=len(missing))
            try:
                for name, (result, lasting) in zip(missing, results, strict=True):
                    checked[name] = result
                    stamp = stamps[name]
                    if stamp is not None and lasting:
                        entries[name] = [*stamp, *vars(result).values()]
            finally:  # Ctrl-C too: what was checked until then need not be checked again
                pool.shutdown(wait=False, cancel_futures=True)
                if cache and not listing.content:
                    text = json.dumps({**_head(options), "files": entries}, separators=(",", ":"))
                    write_or_warn(
                        cache, text, "the checked images cannot be remembered, the next run checks them again"
                    )
    return {name: checked[name] for name in stamps}


def refuse_bad_images(bad: Mapping[str, str], total: int, root: Path, list_file: Path | None) -> UserError:
    """The error to raise when bad images are not to be skipped; names up to 8 of them, and all in list_file.

    bad: name -> reason. total: how many images were checked. list_file: gets one 'name TAB reason' per line.
    """
    rows = [f"{_tail(printable(name), 70)}: {printable(reason)}"[:110] for name, reason in bad.items()]
    shown = rows if len(rows) <= SHOWN else [*rows[:SHOWN], f"and {len(rows) - SHOWN} more"]
    mend = "delete or replace the bad files"
    list_text = "".join(f"{printable(name)}\t{reason}\n" for name, reason in bad.items())
    if list_file and write_or_warn(list_file, list_text, "the list of bad images cannot be written"):
        mend += f"; they are listed in {list_file}"
    return data_error(
        f"{len(rows)} of {total} images cannot be read",
        where="\n".join([_tail(str(root), 110), *shown]),
        why="without data.on_bad_image=skip, training starts only if every image can be decoded",
        fix=[f"{corrected('data.on_bad_image=skip')}  # trains without them", mend],
    )


def write_or_warn(path: Path, text: str, failure: str) -> bool:
    """Replaces the file in one step. Failing to is no reason to stop, and said."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        log.warning(f"{failure}: {error}")
        return False
    return True


def digest_of(data: bytes) -> str:
    """Of a file's content: 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def cache_file(cache_dir: Path, root: Path) -> Path:
    """Where the check of the files below root is remembered."""
    return cache_dir / f"{hashlib.blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()}.json"


def cached_digests(cache: Path) -> dict[str, str]:
    """name -> digest of all files that were checked, which may be gone by now; empty if the cache cannot be read."""
    try:
        return {name: row[2] for name, row in json.loads(cache.read_bytes())["files"].items() if row[2]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return {}


def _check(listing: Listing, name: str, options: ReadOptions) -> tuple[CheckResult, bool, Image.Image | None]:
    """Reads the image once, for digest and decode. The second value: whether the result lasts until the file changes.
    The third: the image, upright.

    A file that may not be read, or a lack of memory, may be mended without a change of the file.
    """
    try:
        data = listing.bytes_of(name)
    except ImageError as error:
        return CheckResult("", 0, 0, _cause(error, name)), False, None
    digest = digest_of(data)
    try:
        decoded = decode_image(data, name, replace(options, bits=0))
    except ImageError as error:
        return CheckResult(digest, 0, 0, _cause(error, name)), not isinstance(error.__cause__, MemoryError), None
    image, findings = decoded.image, decoded.findings
    extrema = (image.getchannel(channel).getextrema() for channel in range(3))  # usually the first one is enough
    if all(high - low <= FLAT for low, high in extrema):
        findings.notes.add(ONE_COLOUR)
    notes = tuple(sorted(findings.notes))
    return CheckResult(digest, *decoded.size, None, findings.bits, notes, look_of(image)), True, image


def _cause(error: ImageError, name: str) -> str:
    return str(error).removeprefix(f"{printable(name)}: ")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and modification time; None for a file that does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _head(options: ReadOptions) -> dict[str, object]:
    """What a cache must have been made with to count; another Pillow may read more or fewer files."""
    made_with = {"max_megapixels": options.max_megapixels, "background": list(options.background)}
    made_with["pillow"] = DECODER
    return {"version": CACHE_VERSION, "options": made_with}


def _load(cache: Path, options: ReadOptions) -> dict[str, list]:
    """name -> [size, mtime_ns, digest, width, height, error, bits, notes, look]; empty for a damaged cache or none."""
    try:
        stored = json.loads(cache.read_bytes())
        entries = stored.pop("files")
        usable = stored == _head(options) and all(map(_is_entry, entries.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return entries if usable else {}


def _is_entry(row: object) -> bool:
    if not (isinstance(row, list) and len(row) == len(_KINDS) and all(map(isinstance, row, _KINDS))):
        return False
    return all(abs(value) < 2**63 for value in row if isinstance(value, int)) and 0 <= row[6] <= 16


def _tail(text: str, length: int) -> str:
    """The end of a long path, since that is where the file's name is."""
    return text if len(text) <= length else "..." + text[3 - length :]
