"""Flags and stray words on the command line of src.train: what they were meant to be.

    --batch-size 4   data.batch_size 4   data.batch_size = 4   data.batch_size: 4     is data.batch_size=4
    data.root=my photos   'data.root=my photos' (with cmd.exe's quotes)               is the word in the shell's quotes
    photos/   sgd   debug   --cpu           is data.root=photos/, optimizer=sgd, debug=true, trainer.accelerator=cpu

src/engine/commands/word_checks.py calls `check_strays`. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from src.engine.commands.hydra_words import is_text
from src.engine.commands.schema import KNOBS
from src.engine.commands.suggestions import (
    HELP,
    VALUES,
    default_of,
    did_you_mean,
    groups,
    meant_by,
    of_path,
    of_word,
    setting_like,
)
from src.engine.commands.user_command import rewritten
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import path_in

# Hydra's own options, and those that take the next word.
FLAGS = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m")
WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--experimental-rerun", "--info", "-i", "--shell-completion", "-sc"),
)
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # web pages turn -- into other dashes
QUOTES = "'\"\u2018\u2019\u201c\u201d"
ASKING = ("help", "hlp", "h", "?", "usage", "man", "/?", "/h")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's options with their values, and the other words. Hydra's parser takes no option between two settings."""
    options, settings, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if word in FLAGS or word.partition("=")[0] in WITH_VALUE:
            options.append(word)
            if word in WITH_VALUE and rest and "=" not in rest[0]:  # --info may stand alone
                options.append(rest.pop(0))
        else:
            settings.append(word)
    return options, settings


def check_strays(words: Sequence[str]) -> None:
    """Raises UserError for a word that is neither an option nor key=value."""
    if "src.train" in words:
        raise UserError(
            "src.train stands twice in the command",
            why="it is the program, and what follows are its settings",
            fix=rewritten(words[words.index("src.train") + 1 :]),
        )
    options, settings = split(words)
    stray = next((word for word in settings if _is_stray(word, settings)), None)
    if stray is None:
        return
    is_flag = _is_flag(stray)
    mended, meant = _mended(settings, stray)
    fix = HELP if mended is None else rewritten([*options, *mended])
    if stray.lstrip(DASHES).lower() in ASKING or "--help" in [*options, *(mended or [])]:
        fix, meant = HELP, ["--help"] if is_flag else []
    raise UserError(
        (f"{stray} is not an option" if is_flag else f"{stray!r} cannot be read: it is not key=value")
        + did_you_mean(*meant),
        why="a setting is key=value, without dashes; options are --help, -m (a sweep), --cfg job (all settings)"
        if is_flag
        else "a setting is key=value without blanks around the =; a value with blanks is quoted for the shell",
        fix=fix,
        code=ExitCode.USAGE if is_flag else ExitCode.CONFIG,
    )


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word[0] in DASHES


def _is_stray(word: str, settings: Sequence[str]) -> bool:
    if word.startswith("~"):
        return False  # src/engine/commands/word_checks.py says what is wrong with it
    if word.startswith("="):
        place = settings.index(word)
        return place > 0 and settings[place - 1] in _keys()
    return "=" not in word or _is_flag(word) or word[0] in QUOTES


def _mended(settings: Sequence[str], stray: str) -> tuple[list[str] | None, list[str]]:
    """The settings with every flag and stray word as what it was meant to be, None if that is not clear; and what the
    flag `stray` was meant to be."""
    done: list[str] = []
    of_stray: list[str] = []
    rest = [word for word in settings if word.strip()]  # "$ARGS" of a shell script is '' if the variable is empty
    while rest:
        word = rest.pop(0)
        following = rest[0] if rest and "=" not in rest[0] and not _is_flag(rest[0]) else None
        key, sign, value = word.partition("=")
        name, _, after_colon = word.partition(":")
        if _is_flag(word):
            meant, takes_next = _of_flag(word, following)
            if not meant:
                return None, []
            del rest[:takes_next]
            done += meant
            of_stray = meant if word == stray else of_stray
        elif word[0] in QUOTES:  # cmd.exe hands single quotes on
            while rest and word[-1] not in QUOTES and "=" not in rest[0]:
                word += " " + rest.pop(0)
            if not word.strip(QUOTES):
                return None, []
            rest.insert(0, word.strip(QUOTES))
        elif sign and key:
            is_open = sum(map(value.count, "[{(")) > sum(map(value.count, "]})")) or value.endswith(",")
            if following is not None and value == "":
                done.append(f"{key}={rest.pop(0)}")
            elif following is not None and (is_open or (is_text(key) and _is_one_text(value, following))):
                rest[0] = f"{word}{'' if is_open and word[-1] in ',:' else ' '}{following}"
            else:
                done.append(word)
        elif name in _keys() and after_colon:
            done.append(f"{name}={after_colon}")
        elif name in _keys() and rest and rest[0].startswith("="):
            value = rest.pop(0).lstrip("=") or (rest.pop(0) if rest else "")
            done.append(f"{name}={value}")
        elif name in _keys() and following is not None:
            done.append(f"{name}={rest.pop(0)}")
        elif meant := of_word(word) or of_path(word):
            done += meant
        else:
            return None, []
    return done, of_stray


def _of_flag(word: str, following: str | None) -> tuple[list[str], int]:
    """The words that a flag stands for, [] if nothing is near, and how many words after it belong to it."""
    name, sign, value = word.lstrip(DASHES).partition("=")
    if not sign and (option := difflib.get_close_matches(f"--{name}", FLAGS, n=1, cutoff=0.8)):
        return option, 0
    if not sign and f"-{name}" in FLAGS:  # written with another dash
        return [f"-{name}"], 0
    if switch := of_word(name.lower()):  # --fp16, --cpu
        return switch, 0
    is_off = name.startswith(("no-", "no_"))
    setting = next(iter(setting_like(name[3:] if is_off else name)), None)
    if setting is None:
        return [], 0
    if sign:
        return meant_by(setting, value), 0
    if following is not None and not is_off:
        return meant_by(setting, following), 1
    is_switch = "true" in VALUES.get(setting.rpartition(".")[2], {})
    is_switch = is_switch or (setting in KNOBS and KNOBS[setting].type == "bool")
    if is_off:
        return (meant_by(setting, "false") if is_switch else []), 0
    return meant_by(setting, "true" if is_switch else default_of(setting)), 0


def _keys() -> set[str]:
    return {*KNOBS, *groups()}


def _is_one_text(value: str, following: str) -> bool:
    """Whether the shell has cut a text in two, as of data.root=my photos."""
    separate = of_word(following) or (of_path(following) and path_in(value).exists())
    return not separate or path_in(f"{value} {following}").exists()
