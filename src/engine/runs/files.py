"""Files written so that a crash leaves the old one whole: text, JSON, CSV; and locks on files."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import printable

log = logging.getLogger(__name__)

# The files of a run, of its checkpoints/ and model/, and of a sweep.
OWN_FILES = (
    r"(?:(?:environment|result|batch_size|model|evaluation\S*|sweep|trial|\d+)\.json|(?:config|optimization_results)\.yaml"
    r"|(?:split|metrics|memory|confusion|evaluation\S*|sweep)\.csv|model_summary\.txt|report\.html|trials\.jsonl"
    r"|(?:last|best|epoch-\d+)\.ckpt|model\.safetensors|(?:features|images)-[0-9a-f]+\.safetensors|README\.md)"
)
# How some network and FUSE file systems answer calls that they do not support.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY)
_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # with the ' that a cell may begin with already
# A file's name is bytes. Python reads bytes that are not UTF-8 as lone surrogates; this encoding writes the same bytes.
NAMES: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}


def write_atomically(path: Path, write: Callable[[BinaryIO], object], keep_old_as: Path | None = None) -> None:
    """Writes beside the target, syncs, then renames: a reader or a crash finds the old file or the new one, whole.

    The temporary file is in the target's folder, because a rename is atomic within one file system only.
    keep_old_as: the old file's new name; a crash between the two renames leaves it there, and no new file yet.
    A link stays a link to the file; a device or a pipe (/dev/null, /dev/stdout) is written to and never replaced.
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
            _sync(file.fileno())
        if keep_old_as is not None and path.exists():
            _rename(path, keep_old_as)
        _rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # makes the rename itself durable; Windows has no such call
        with suppress(OSError):  # nor have some network file systems; and a folder may be writable and not readable
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _rename(source: Path, target: Path) -> None:
    """Removes the target first on file systems that do not rename over a file, or over an open one."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EBUSY, errno.EPERM, *UNSUPPORTED) or not target.exists():
            raise
        target.unlink()
        source.replace(target)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of write_atomically, NAME.PID.tmp, whose process was killed. Only names that this program
    writes: other people's *.tmp are theirs."""
    for path in folder.glob("*.tmp"):
        match = re.fullmatch(rf"{OWN_FILES}\.(\d+)\.tmp", path.name)
        if match and path.is_file() and not _is_alive(int(match[1])):
            with suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill would end the process there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


@contextmanager
def locked(path: Path, busy: UserError) -> Iterator[None]:
    """Inside, this process holds the lock, and another one raises `busy`. The system releases it when the process ends.

    Raises OSError where the file cannot be made.
    """
    if sys.platform == "win32":
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise busy from None
        with lock:
            yield
        return
    import fcntl  # not FileLock: where the file system has no locks, its lock file outlives a killed process

    with path.open("a") as file:
        os.register_at_fork(after_in_child=file.close)  # else the loader processes of a killed run keep the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise busy from None
            if error.errno not in (errno.ENOLCK, *UNSUPPORTED):
                raise
            _say_no_locks(os.strerror(error.errno))
        yield


@cache
def _say_no_locks(why: str) -> None:
    log.warning(
        f"The file system has no locks ({why}): see to it yourself that no two commands write the same run at the same time."
    )


def make_folder(path: Path, key: str, file: str = "") -> None:
    """Makes the folder of the results and tries to write a file in it, before the work is done. Raises UserError.

    key: the setting that names the folder, or the file in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise cannot_write(path, error, corrected(f"{key}=~/{file or path.absolute().name}")) from error


def cannot_write(path: Path, error: OSError, fix: str) -> UserError:
    return UserError(
        f"the folder {printable(path)} cannot be made or written to: {error.strerror}",
        where=str(path.absolute()),
        why="the results go there",
        fix=fix,
        code=ExitCode.CANNOT_WRITE,
    )


def existing_parent(path: Path) -> Path:
    """The nearest existing folder above a path: the place to look for the intended file."""
    return next(parent for parent in [*path.parents, Path()] if parent.is_dir())


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode(**NAMES)))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(_with_nulls(value), allow_nan=False, indent=2) + "\n")


def _with_nulls(value: Any) -> Any:
    """nan and inf, which JSON does not have, become null."""
    if isinstance(value, dict):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A CSV file with one header line: UTF-8, commas, RFC 4180 quoting, no cell that a spreadsheet would compute."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([harmless(cell) for cell in row] for row in [header, *rows])
    write_text(path, text.getvalue())


def harmless(cell: Any) -> Any:
    """A cell of a CSV file: a ' in front makes text of a formula such as =1+1 in every spreadsheet. Numbers stay numbers."""
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    with suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"


def original(cell: str) -> str:
    """The inverse of `harmless`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv as numbers, without empty cells."""
    with path.open(newline="", **NAMES) as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def rows_to_continue(path: Path) -> list[dict[str, str]]:
    """The whole rows of metrics.csv or memory.csv, to which a continued run adds its own; [] where there is no file.

    A file that a spreadsheet saved with other separators or decimal commas is kept under another name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))  # a power cut can leave half a line
        for row in rows:
            int(row["step"]), row["epoch"], [float(value) for value in row.values() if value]
        return rows
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, csv.Error):
        changed = path.with_name(f"{path.stem}.changed.csv")
        log.warning(f"{path} is not as the run wrote it: it is kept as {changed.name}, and {path.name} begins anew.")
        with suppress(OSError):
            path.replace(changed)
        return []


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
