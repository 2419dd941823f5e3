"""Files written so that a crash leaves the old one whole; UTF-8, and names that are no UTF-8 keep their bytes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from src.errors import ExitCode, UserError
from src.text import printable
from src.user_command import corrected

# A file's name is bytes. Python reads those that are no UTF-8 as lone surrogates, and this writes them back as they were.
NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}


def write_atomically(path: Path, write: Callable[[BinaryIO], object], keep_old_as: Path | None = None) -> None:
    """Writes beside the target, syncs, then renames: a reader or a crash finds the old file or the new one, whole.

    The temporary file is in the target's folder, since a rename is atomic on one file system only. keep_old_as: the name
    that the old file gets; a crash between the two renames leaves the old file under that name and the new one not yet.
    A link stays a link to the file; a device or a pipe (/dev/null, /dev/stdout) is written to, and never replaced.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            write(file)
        return
    path = path.resolve() if path.is_symlink() else path
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_old_as is not None and path.exists():
            path.replace(keep_old_as)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # makes the rename itself durable; Windows has no such call
        handle = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(path: Path, key: str, file: str = "") -> None:
    """Makes the folder that results go to and tries whether a file can be written in it, before the work is done.

    key: the setting that names it, or the file in it. Raises UserError.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"the folder {printable(path)} cannot be made or written to: {error.strerror}",
            where=str(path.absolute()),
            why="the results go there",
            fix=corrected(f"{key}=~/{file or path.absolute().name}"),
            code=ExitCode.CANNOT_WRITE,
        ) from error


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that does not exist: where to look for what was meant."""
    return next(parent for parent in [*path.parents, Path()] if parent.is_dir())


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode(**NAMES)))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A CSV file with one header line; UTF-8, comma, RFC 4180 quoting."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv as numbers; cells without a value are left out."""
    with path.open(newline="", **NAMES) as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
