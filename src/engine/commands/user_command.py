"""The user's own command line: as it was typed, and corrected for the `fix` lines of a UserError.

A fix keeps every word the user typed and changes only what was wrong, so that pasting it does what was meant.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from src.engine.runs.text import shell_word

FRONT_DOORS = ("train", "evaluate", "predict", "embed", "export", "compare", "report")
_COMMAND = "TRAIN_COMMAND"  # environment variable: what the user typed, where sys.argv is something else


def shell_command() -> str:
    """The command line as it can be pasted again. In a rank or a trial: the command that the user started it by."""
    if _COMMAND in os.environ:
        return os.environ[_COMMAND]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]])


def speak_of(program: str) -> None:
    """From here on the user's command is that of another program with the same words: src.doctor's messages correct the
    training that it looks at."""
    os.environ[_COMMAND] = shlex.join(["python", "-m", program, *sys.argv[1:]])


def is_training() -> bool:
    """Whether the user's command is src.train, whose settings have sections; the other programs' words have none."""
    return _program() == "train"


def of_data(word: str) -> str:
    """A setting of data. as the user's command spells it: src.predict's words have no sections."""
    return word if _program() in ("predict", "embed") else f"data.{word}"


def key_of(word: str) -> str:
    """The setting that a key=value word is about, without Hydra's + and ~."""
    return word.partition("=")[0].lstrip("+~")


def typed_words() -> list[str]:
    """The user's words, as the shell gave them."""
    return _split()[1]


def typed_value(key: str) -> str | None:
    """The value that the user has typed for a setting."""
    return next((word.partition("=")[2] for word in typed_words() if key_of(word) == key), None)


def is_typed(key: str) -> bool:
    """Whether the user has typed the setting; a recipe may bring it too."""
    return typed_value(key) is not None


def rewritten(words: Sequence[str]) -> str:
    """The user's program with these words instead of those that were typed, quoted for the shell."""
    return " ".join(map(shell_word, [*_split()[0], *words]))


def replaced(word: str, *instead: str) -> str:
    """The user's command with other words in the place of one."""
    return rewritten([other for typed in typed_words() for other in (instead if typed == word else (typed,))])


def typed_name() -> str | None:
    """The name of the run or sweep, if the user has typed one."""
    return typed_value("name")


def named(folder: str, suffix: str = "") -> str:
    """The user's command with the name it was typed with, or else the folder's, so that it continues the run."""
    return corrected(f"name={typed_name() or folder}{suffix}")


@contextmanager
def standing_in(words: Sequence[str]) -> Iterator[None]:
    """Gives a library other words in sys.argv; messages still know those that the user typed."""
    argv, before = sys.argv[:], os.environ.get(_COMMAND)
    os.environ[_COMMAND] = shell_command()
    sys.argv[1:] = words
    try:
        yield
    finally:
        sys.argv[:] = argv
        if before is None:
            os.environ.pop(_COMMAND, None)


def corrected(*words: str, remove: Sequence[str] = ()) -> str:
    """The user's command with these words put right, quoted for the shell.

    A `key=value` word takes the place of what was typed for the same key, or is added at the end; a flag (`-m`) is put
    before the first word. remove: keys, or whole words, that are left out. Outside a front door (a notebook, a test)
    there is no user's command, and the words are given to src.train.
    """
    options = tuple(f"{key}." for key in remove if key.endswith("options"))  # of an own part, each a word
    kept = [
        word for word in typed_words() if not {key_of(word), word} & {*remove} and not key_of(word).startswith(options)
    ]
    for word in words:
        if word.startswith("-"):
            kept = kept if word in kept else [word, *kept]
            continue
        if word.startswith("data=") and not is_training():  # the other programs have no groups
            word = f"data.source={word.removeprefix('data=')}"
        places = [place for place, other in enumerate(kept) if "=" in other and key_of(other) == key_of(word)]
        if places:
            kept[places[0]] = word
            kept = [other for place, other in enumerate(kept) if place not in places[1:]]
        else:
            kept.append(word)
    return rewritten(kept)


def _split() -> tuple[list[str], list[str]]:
    """The program and the user's words; src.train without a word if the command is not one of ours."""
    parts = shlex.split(shell_command())
    start = 3 if parts[1:2] == ["-m"] else 2
    if _name(parts[start - 1]) not in FRONT_DOORS:
        return ["python", "-m", "src.train"], []
    return parts[:start], parts[start:]


def _program() -> str:
    return _name(_split()[0][-1])


def _name(program: str) -> str:
    return program.removesuffix(".py").replace("/", ".").rpartition(".")[2]
