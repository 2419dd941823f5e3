"""Looks into folders: which entries count, which are images, and what was left out, with its number.

src/engine/images/layout.py decides with it what a folder is, src/engine/images/folders.py lists the images. No image is
opened here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from src.engine.images.formats import EXTENSIONS, HEIC_EXTENSIONS
from src.engine.images.time_limit import in_time
from src.engine.runs.errors import UserError, data_error
from src.engine.runs.text import few, printable, shell_word

# Folders and files that NAS, desktop and notebook programs make beside one's own, in lower case. Names that begin with
# a dot (.git, .dvc, .ipynb_checkpoints, .thumbnails, .Trash-1000, .DS_Store, ._name of AppleDouble) need no line here, and
# words that may be a class (recycled, thumbnails) must have none.
SYSTEM_NAMES = frozenset(
    [
        # Synology and QNAP
        *("@eadir", "@tmp", "@sharebin", "@sharesnap", "@recycle", "@recently-snapshot", "@__thumb", "@synoresource"),
        *("#recycle", "#snapshot"),
        # Windows and its programs
        *("$recycle.bin", "system volume information", "found.000", "$windows.~bt"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info"),
        # Unix, macOS, archives, Python
        *("lost+found", "__macosx", "icon\r", "network trash folder", "temporary items", "thevolumesettingsfolder"),
        *("__pycache__", "node_modules"),
    ]
)


@dataclass
class Omissions:
    """What was passed over: files of other formats by their ending, and hidden and system entries by their name."""

    endings: Counter[str] = field(default_factory=Counter)
    system: Counter[str] = field(default_factory=Counter)

    def sentences(self, root: Path) -> list[str]:
        lines = []
        if count := self.endings.total():
            files = "1 file" if count == 1 else f"{count} files"
            lines.append(
                f"{files} in {printable(root)} left out, of formats that are not read as images: "
                f"{counts(self.endings)}{how_to_convert(self.endings)}"
            )
        if self.system:
            lines.append(f"{self.system.total()} hidden or system entries left out: {counts(self.system)}")
        return lines


def is_foreign(name: str) -> bool:
    """Whether an entry is hidden, or made by a NAS, a desktop or a notebook program, and so no part of the set."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def scan(folder: Path, left_out: Omissions | None = None) -> list[os.DirEntry]:
    """The entries of a folder that count, sorted by name. Raises UserError for a folder that cannot be looked into."""
    try:
        [found] = in_time(_entries, [folder])
    except OSError as error:
        raise _unreadable(folder, error) from error
    kept = sorted([entry for entry in found if not is_foreign(entry.name)], key=attrgetter("name"))
    if left_out is not None and len(kept) < len(found):
        names = sorted(entry.name for entry in found if is_foreign(entry.name))
        left_out.system.update("._*" if name.startswith("._") else name for name in names)
    return kept


def _entries(folder: Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return list(entries)


def sub_folders(folder: Path, left_out: Omissions | None = None) -> list[str]:
    return [entry.name for entry in scan(folder, left_out) if is_folder(entry)]


def images_in(folder: Path) -> list[str]:
    """Names of the images that lie in the folder itself."""
    return [entry.name for entry in scan(folder) if not is_folder(entry) and is_image(entry.name)]


def images_below(folder: Path, left_out: Omissions, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The images of a folder and its sub-folders, sorted. Links are followed, but never in a circle.

    above: folders that hold this one: a link to one of them is a circle too.
    """
    seen = {_identity(path) for path in above}

    def walk(current: Path) -> Iterator[Path]:
        identity = _identity(current)
        if identity in seen:
            return
        seen.add(identity)
        for entry in scan(current, left_out):
            if is_folder(entry):
                yield from walk(Path(entry.path))
            elif is_image(entry.name):
                yield Path(entry.path)
            else:
                left_out.endings[Path(entry.name).suffix.lower() or "without an ending"] += 1

    return walk(folder)


def holds_images(folder: Path) -> bool:
    with suppress(OSError):
        if in_time(_begins_with_images, [folder])[0]:
            return True
    return next(images_below(folder, Omissions()), None) is not None


def _begins_with_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:  # usually the first entry answers it
        return any(is_image(entry.name) and not is_foreign(entry.name) and not is_folder(entry) for entry in entries)


def is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS


def is_folder(entry: os.DirEntry) -> bool:
    """False for a link to itself, which has no end; as a file it is then named by the check."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def how_to_convert(endings: Counter[str]) -> str:
    """What to do with the usual formats of cameras that are not read; empty where none is among the endings."""
    phone = {".heic", ".heif", ".hif", ".jxl", ".jp2"} & set(endings)
    raw = {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw"} & set(endings)
    video = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".3gp"} & set(endings)
    advice = []
    if phone or raw:
        advice.append(f"convert {', '.join(sorted(phone | raw))} to JPEG, for instance with magick mogrify -format jpg")
    if HEIC_EXTENSIONS & phone:  # not read here
        advice.append('pip install -e ".[heic]" reads HEIC')
    if video:
        advice.append(f"take frames out of {', '.join(sorted(video))}, for instance with ffmpeg -vf fps=1")
    return f" ({'; '.join(advice)})" if advice else ""


def counts(counter: Counter[str], limit: int = 6) -> str:
    return few([f"{count} {name}" for name, count in counter.most_common()], limit)


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return status.st_dev, status.st_ino


def _unreadable(folder: Path, error: OSError) -> UserError:
    return data_error(
        f"the folder {printable(folder)} cannot be read: {error.strerror}",
        where=folder,
        why="what it holds is not known, so nothing is trained on or predicted without it",
        fix=[f"ls -ld {shell_word(folder)}", f"chmod u+rx {shell_word(folder)}   # or take it out of the set"],
    )
