"""Reads the tables a user brings: the CSV of data=table and the one of data.split_file.

Spreadsheets write them in many ways, so the separator (comma, semicolon, tab, |) and the encoding (UTF-8, UTF-16,
Windows-1252) are found out. One image is one path: `./a.jpg`, `x//a.jpg`, `x\\a.jpg` and the absolute path are the same.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from src.engine.commands.user_command import corrected
from src.engine.images.labelled_images import Listing
from src.engine.images.layout import split_of
from src.engine.images.spelling import alike, refuse_alike
from src.engine.runs.errors import ExitCode, UserError, data_error
from src.engine.runs.files import original
from src.engine.runs.text import printable, shell_word

if TYPE_CHECKING:
    from src.engine.steps.task_kind import TaskKind

log = logging.getLogger(__name__)

SEPARATORS = (",", ";", "\t", "|")
Row = tuple[int, dict[str, str]]  # the row's first line in the file, from 1, and its cells by column


def list_table(
    table: Path, root: Path | None, kind: TaskKind, columns: Sequence[str] = (), group: str | None = None
) -> Listing:
    """The images of a CSV file with the columns path,label and optionally split and group. Paths start from root, or from the
    table.

    columns: those with the label instead; the task makes one text of them. group: the column with the group, if the table has
    it; its listing then names it.
    """
    places = {column.strip(): column.strip().lower() for column in columns or ["label"]}
    rows = read_csv(table, ("path", *places.values()))
    root = root or table.parent
    column = (group or "group").strip().lower()
    splits, groups = ([] if name in rows[0][1] else None for name in ("split", column))
    listing = Listing(root, splits=splits, groups=groups, source=str(table))
    if groups is not None:
        listing.grouped_by = group or column
    missing: list[tuple[int, str]] = []
    lines: defaultdict[str, list[int]] = defaultdict(list)
    for line, row in rows:
        if not row["path"].strip():
            raise _row_error("a row without a path", table, line, "every image needs a path and a label")
        try:
            text = kind.label_text({column: _text(row[place], table, line) for column, place in places.items()})
        except ValueError as error:
            shown = ", ".join(f"{place} is {printable(row[place])[:60]!r}" for place in [*places.values()][:4])
            raise _row_error(f"a row whose label cannot be used: {shown}", table, line, str(error)) from error
        forms = (form for form in spellings(row["path"]) if _is(root / form, Path.is_file))
        name = next((relative(form, root) for form in forms), None)
        if name is None:
            missing.append((line, row["path"]))
            continue
        lines[name].append(line)
        listing.names.append(name)
        listing.labels.append(text)
        if listing.splits is not None:
            listing.splits.append(known_split(row["split"], table, line))
        if listing.groups is not None:
            listing.groups.append(_group(row[column], table, line))
    if missing:
        raise _missing(table, root, missing, len(rows))
    if twice := [(name, where) for name, where in lines.items() if len(where) > 1]:
        shown = [f"{printable(name)}: lines {', '.join(map(str, where[:6]))}" for name, where in twice[:5]]
        first, second, *_ = twice[0][1]
        raise data_error(
            f"{len(twice)} images stand twice in {printable(table)}",
            where="\n".join([printable(table.absolute()), *shown]),
            why="with two labels or in two splits an image would spoil the result",
            fix=f"sed -n '{first}p;{second}p' {shell_word(table)}   # keep one of the lines",
        )
    refuse_alike(kind.words(listing.labels), table, "write the label in one way in every row")
    listing.labels = [label.strip() for label in listing.labels]  # 'a.jpg, cat' in every row
    return listing


def read_csv(path: Path, columns: Sequence[str], *, ours: bool = False) -> list[Row]:
    """The rows of a CSV file that must have the columns, whose names are compared without case and blanks.

    Bytes that are no UTF-8 come as surrogates (PEP 383), as in file names, so that a path finds its file again. Empty
    rows are passed over. ours: a split.csv, in which src/engine/runs/files.py put a ' before formulas. Raises
    UserError, naming the line.
    """
    try:
        text = _decode(path.read_bytes())
    except (OSError, UnicodeError) as error:
        found = f"{printable(path)} cannot be read: {getattr(error, 'strerror', None) or error}"
        why = "it must be a CSV file: text in UTF-8, UTF-16 or Windows-1252"
        raise UserError(
            found, where=printable(path.absolute()), why=why, fix=f"ls -l {shell_word(path)}", code=ExitCode.NO_INPUT
        ) from error
    header, separator = _header(text, columns)
    missing = [column for column in columns if column not in header]
    repeated = [column for column in (*columns, "label", "split") if header.count(column) > 1]
    if missing or repeated:
        wrong = f"has no column {missing[0]}" if missing else f"has {header.count(repeated[0])} columns {repeated[0]}"
        raise _not_the_table(path, wrong, columns, header)
    rows: list[Row] = []
    for line, cells in islice(_rows(text, separator, path), 1, None):
        if any(cell.strip() for cell in cells[len(header) :]):
            why = f"the first line names {len(header)} columns; a cell with a separator in it must be in quotes"
            raise _row_error(f"a row with {len(cells)} cells", path, line, why)
        cells = [original(cell) for cell in cells] if ours else cells
        rows.append((line, dict(zip_longest(header, cells[: len(header)], fillvalue=""))))
    if not rows:
        raise _not_the_table(path, "has no rows", columns, header)
    return rows


def _rows(text: str, separator: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line in the file, cells) of the rows that are not empty, without Excel's own first line, sep=;"""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line, is_first = 1, True
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if not (is_first and cells[0].strip().lower().startswith("sep=")):
                    yield line, cells
                is_first = False
            line = reader.line_num + 1
    except csv.Error as error:
        why = "a quote may be open, or in the wrong place"
        raise _row_error(f"a row that is no CSV: {error}", path, line, why) from error


def _not_the_table(path: Path, wrong: str, columns: Sequence[str], header: Sequence[str]) -> UserError:
    named = ", ".join(printable(column) for column in header if column)[:200] or "nothing"
    found = f"{printable(path)} {wrong}"
    why = f"its first line must name the columns {', '.join(columns)}, each once; it names {named}"
    return data_error(found, where=path, why=why, fix=f"head -3 {shell_word(path)}")


def known_split(word: str, path: Path, line: int) -> str:
    """train, val or test of a word that means one of them. Raises UserError."""
    split = split_of(word)
    if split is None:
        found = f"{printable(repr(word))} is not a split"
        raise _row_error(found, path, line, "the column split takes train, val or test")
    return split


def spellings(name: str) -> list[str]:
    """Ways to write a relative path, the likeliest first: as it is, shortened, with / for \\, from Windows-1252."""
    forms = [name, name.strip()]
    forms += [form.replace("\\", "/") for form in forms]
    if not name.isprintable():
        with suppress(UnicodeError):
            forms.append(os.fsencode(name).decode("cp1252"))
    shortened = [posixpath.normpath(form) for form in forms if form.strip()]
    return list(dict.fromkeys(form[1:] if form.startswith("//") else form for form in shortened))


def relative(path: str, root: Path) -> str:
    """An absolute path below root as the relative one; others as they are."""
    base = posixpath.normpath(root.absolute().as_posix()).rstrip("/") + "/"
    return path.removeprefix(base) if posixpath.isabs(path) else path


def _decode(data: bytes) -> str:
    """The text; bytes that are not UTF-8 become surrogates. Raises UnicodeError for UTF-16 that is cut."""
    utf32, utf16 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    for marks, encoding in ((utf32, "utf-32"), (utf16, "utf-16")):  # UTF-16's first mark begins UTF-32's, too
        if data.startswith(marks):
            return data.decode(encoding)
    if b"\0" in data[:2]:  # UTF-16 without its mark: a header in ASCII has a zero in every second byte
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _header(text: str, columns: Sequence[str]) -> tuple[list[str], str]:
    """The names of the columns, and the separator with which most of the wanted ones are found."""
    best: tuple[tuple[int, int], list[str], str] = ((-1, 0), [], ",")
    for separator in SEPARATORS:
        with suppress(UserError):  # a quote that is open with this separator
            _, cells = next(_rows(text, separator, Path()), (0, []))
            names = [cell.strip().strip('"').strip().lower() for cell in cells]
            hits = sum(column in names for column in columns), len(names)
            best = max(best, (hits, names, separator), key=lambda one: one[0])
    return best[1], best[2]


def _text(cell: str, table: Path, line: int) -> str:
    """A label: bytes that are no UTF-8 are read as Windows-1252, the encoding of older spreadsheets."""
    try:
        cell.encode()
    except UnicodeEncodeError:
        try:
            return cell.encode("utf-8", "surrogateescape").decode("cp1252")
        except UnicodeError as error:
            found = f"a label that is neither UTF-8 nor Windows-1252: {printable(cell)}"
            raise _row_error(found, table, line, "save the table in UTF-8") from error
    return cell


def _group(cell: str, table: Path, line: int) -> str:
    if not cell.strip():
        why = "images of one group go to one split together; an image of its own needs a group of its own"
        raise _row_error("a row without a group", table, line, why)
    return cell.strip()


def _missing(table: Path, root: Path, missing: list[tuple[int, str]], total: int) -> UserError:
    shown = [f"line {line}: {_closest(path, root)}" for line, path in missing[:5]]
    line, first = missing[0]
    fix = corrected("data=table", f"data.table={table}", "data.root=photos/") + "   # the folder the paths start from"
    if "the disk has" in shown[0] or re.match(r"/|[A-Za-z]:[\\/]", first):  # another root would not help
        fix = f"sed -n {line}p {shell_word(table)}   # write the paths as the files are named, from the table's folder"
    found = f"{len(missing)} of {total} images in {printable(table)} do not exist"
    why = "\n".join(shown + ([f"and {len(missing) - 5} more"] if len(missing) > 5 else []))
    return UserError(found, where=f"below {printable(root.absolute())}", why=why, fix=fix, code=ExitCode.NO_INPUT)


def _is(path: Path, predicate: Callable[[Path], bool]) -> bool:
    """predicate(path); False where the path cannot be looked at: too long, or in a folder that may not be entered."""
    try:
        return predicate(path)
    except OSError:
        return False


def _closest(path: str, root: Path) -> str:
    """The path, and beside it the file of the disk that differs in case, blanks or Unicode form, both with escapes."""
    if _is(root / path, Path.is_dir):
        return f"{printable(path)} is a folder"
    if len(path) > 200:
        return printable(f"{path[:60]} ... {path[-30:]}")
    current = root
    for part in posixpath.normpath(path.replace("\\", "/")).split("/"):
        if _is(current / part, Path.exists):
            current = current / part
            continue
        beside = [entry.name for entry in current.iterdir()] if _is(current, Path.is_dir) else []
        near = [name for name in beside if alike(part) in (alike(name), alike(Path(name).stem))]
        if not near:
            return printable(path)
        current = current / near[0]
    return f"{path!a}, while the disk has {current.relative_to(root).as_posix()!a}"


def _row_error(found: str, table: Path, line: int, why: str) -> UserError:
    where = f"{printable(table)}, line {line}"
    return data_error(found, where=where, why=why, fix=f"sed -n {line}p {shell_word(table)}")
