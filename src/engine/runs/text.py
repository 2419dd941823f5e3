"""Text from outside (names of files, classes, runs, tensors), made safe for a terminal, a table, a page or a shell."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#&~])")


def printable(text: object) -> str:
    """The text on one line, with escapes for line breaks, control characters, marks that turn or hide text, and bytes that
    are no text, so that no terminal obeys a file's name."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in str(text))


def printable_lines(text: str) -> str:
    """The same for our own text of several lines: line breaks and tabs stay."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _escape(letter) for letter in text)


def few(names: Collection[object], limit: int = 6) -> str:
    """The first names, and how many more there are, on one line: a, b and 7 more."""
    shown = ", ".join(printable(name) for name in list(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def plural(number: int, noun: str) -> str:
    """1 image, 2 images"""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def decimal(number: float) -> str:
    """With four digits after the point, as an accuracy; a quantity that is far from 1 with three or six digits in all."""
    if number == 0 or not math.isfinite(number) or 1e-3 <= abs(number) < 1e4:
        return f"{number:.4f}"
    return f"{number:.2e}" if abs(number) < 1 else f"{number:.6g}"


def for_markdown(value: object) -> str:
    """The text on one line, with Markdown's characters escaped."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(str(value).split())))


def shell_word(word: object) -> str:
    """The word quoted for the shell, as $'...' if it has characters that a terminal does not show."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    quoted = "".join(_bash_escape(letter) for letter in text)
    return f"$'{quoted}'"


def as_typed(value: object) -> str:
    """A value of a setting as it is typed: true, null, [1,2]."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return re.sub("[ ']", "", str(value)) if isinstance(value, list | dict) else str(value)


def at_home(path: str) -> str:
    """The path with ~ expanded, which shells do not do after a =. ~nobody stays."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path raises for ~nobody, and rewrites the rest of a path


def path_in(text: str) -> Path:
    return Path(at_home(text))


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _bash_escape(letter: str) -> str:
    if letter in "'\\":
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape"))


def duration(seconds: float) -> str:
    """'1.2 s', '3 min' or '2.5 h'."""
    if seconds < 60:
        return f"{round(seconds, 1):g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{round(seconds / 3600, 1):g} h"
