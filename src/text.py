"""Text from elsewhere (names of files, classes, runs, tensors) before it reaches a terminal, a table, a page or a shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#&~])")


def printable(text: object) -> str:
    """The text on one line: line breaks, control characters, marks that turn or hide text, and bytes that are no text
    are shown with escapes, so that nobody's terminal obeys a file's name."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in str(text))


def printable_lines(text: str) -> str:
    """The same for a text of our own of several lines: its line breaks and tabs stay."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _escape(letter) for letter in text)


def for_markdown(value: object) -> str:
    """The text on one line, as Markdown shows it and does not read it."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(str(value).split())))


def shell_word(word: object) -> str:
    """The word quoted for the shell; with the shell's own escapes ($'...') where a terminal would not show it as it is."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    quoted = "".join(_bash_escape(letter) for letter in text)
    return f"$'{quoted}'"


def path_in(text: str) -> Path:
    """A path as it was typed, with ~ and ~user expanded: the shell leaves them alone behind a `key=`."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody has this name
        return Path(text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _bash_escape(letter: str) -> str:
    if letter in "'\\":
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape"))
