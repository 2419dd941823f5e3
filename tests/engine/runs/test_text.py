"""Names from elsewhere reach no terminal, page or shell as anything but text."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest

from src.engine.runs.text import decimal, for_markdown, path_in, printable, printable_lines, shell_word

NASTY = {
    "\x1b[31mred\x1b[0m.png": "\\x1b[31mred\\x1b[0m.png",
    "two\nlines\r": "two\\nlines\\r",
    "photo\u202egnp.exe": "photo\\u202egnp.exe",
    "zero\u200bwidth\ufeff": "zero\\u200bwidth\\ufeff",
    "Stra\udcdfe": "Stra\\udcdfe",
    "Bücher 猫 [/] $x$": "Bücher 猫 [/] $x$",
}


@pytest.mark.parametrize(("name", "shown"), NASTY.items())
def test_what_a_terminal_would_obey_is_shown_with_escapes(name, shown):
    assert printable(name) == shown
    assert printable_lines(f"{name}\n") == printable(name).replace("\\n", "\n") + "\n"


@pytest.mark.parametrize("name", [*NASTY, "it's", "a b", "\\", "\x1b'\\\u202e"])
def test_a_word_for_the_shell_is_the_word(name):
    word = shell_word(name)
    assert word.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(name)


def test_plain_words_are_quoted_as_shlex_does():
    assert shell_word("a b") == shlex.quote("a b")


def test_markdown_is_not_read():
    assert for_markdown("[x](http://y) | <b>\x1b") == r"\[x\](http://y) \| \<b\>\\x1b"


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        *((0.98765, "0.9877"), (12.5, "12.5000"), (-0.25, "-0.2500"), (0.0, "0.0000"), (99999.06, "99999.1")),
        *((3.21e-5, "3.21e-05"), (0.00012345, "1.23e-04"), (1234567.8, "1.23457e+06"), (float("nan"), "nan")),
    ],
)
def test_numbers_far_from_1_keep_their_digits(number, shown):
    assert decimal(number) == shown


def test_a_tilde_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(path_in("~/photos")) == "/somewhere/photos"
    assert str(path_in("a~b")) == "a~b"
    assert str(path_in("~nobody_has_this_name/x")) == "~nobody_has_this_name/x"
