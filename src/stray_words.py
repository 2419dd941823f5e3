"""Flags and stray words on the command line of src.train: what they were meant to be.

    --batch-size 4   data.batch_size 4   data.batch_size = 4   data.batch_size: 4     is data.batch_size=4
    data.root=my photos   'data.root=my photos' (with cmd.exe's quotes)               is the word in the shell's quotes
    photos/   sgd   debug   --cpu           is data.root=photos/, optimizer=sgd, debug=true, trainer.accelerator=cpu

src/word_checks.py calls `check_strays`. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from src.config import KNOBS
from src.errors import ExitCode, UserError
from src.hydra_words import TEXTS
from src.other_names import VALUES
from src.suggestions import HELP, example, groups, meant_by, of_word, setting_like
from src.text import path_in
from src.user_command import rewritten

# Hydra's own options, and those that take the next word.
FLAGS = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m")
WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--experimental-rerun", "--info", "-i", "--shell-completion", "-sc"),
)
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # a web page makes other dashes of --
QUOTES = "'\"\u2018\u2019\u201c\u201d"
ASKING = ("help", "hlp", "h", "?", "usage", "man", "/?", "/h")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's options with their values, and the other words. Hydra's parser takes no option between two settings."""
    options, settings, skip = [], [], False
    for place, word in enumerate(words):
        if skip:
            options.append(word)
            skip = False
        elif word in WITH_VALUE:
            options.append(word)
            skip = place + 1 < len(words) and "=" not in words[place + 1]  # --info may stand alone
        elif word in FLAGS or word.partition("=")[0] in WITH_VALUE:
            options.append(word)
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
        _check_cfg(words)
        return
    flag = _is_flag(stray)
    mended, meant = _mended(settings, stray)
    kept = [*options, *(mended or [])]
    if stray.lstrip(DASHES).lower() in ASKING or "--help" in kept:
        mended, meant = None, ["--help"] if flag else []
    raise UserError(
        (f"{stray} is not an option" if flag else f"{stray!r} cannot be read: it is not key=value")
        + (f"; did you mean {' '.join(meant)}?" if meant else ""),
        why="a setting is key=value, without dashes; options are --help, -m (a sweep), --cfg job (all settings)"
        if flag
        else "a setting is key=value without blanks around the =; a value with blanks is quoted for the shell",
        fix=rewritten(kept) if mended is not None else HELP,
        code=ExitCode.USAGE if flag else ExitCode.CONFIG,
    )


def _is_flag(word: str) -> bool:
    return word[:1] in [*DASHES] and len(word) > 1


def _is_stray(word: str, settings: Sequence[str]) -> bool:
    if word.startswith("~"):
        return False  # src/word_checks.py says what is wrong with it
    if word.startswith("="):
        place = settings.index(word)
        return place > 0 and settings[place - 1] in _keys()
    return "=" not in word or _is_flag(word) or word[0] in QUOTES


def _check_cfg(words: Sequence[str]) -> None:
    """--cfg needs to be told whose config; the other options are for those who know Hydra, which answers them itself."""
    for place, word in enumerate(words):
        name, sign, value = word.partition("=")
        told = value if sign else "".join(words[place + 1 : place + 2])
        if name in ("--cfg", "-c") and told not in ("job", "hydra", "all"):
            left = words[place + 1 :] if sign or "=" in told else words[place + 2 :]
            raise UserError(
                f"{name} is to show job, hydra or all" + (f", and {told!r} is none of them" if told else ""),
                why="job is the config of the run: every setting with its value",
                fix=rewritten([*words[:place], "--cfg", "job", *left]),
                code=ExitCode.USAGE,
            )


def _mended(settings: Sequence[str], stray: str) -> tuple[list[str] | None, list[str]]:
    """The settings with every flag and stray word as what it was meant to be, None where that is not clear; and what
    `stray`, the first of them, was meant to be where that can be said by itself."""
    done: list[str] = []
    rest, shown = list(settings), []
    while rest:
        word = rest.pop(0)
        following = rest[0] if rest and "=" not in rest[0] and not _is_flag(rest[0]) else None
        key, sign, value = word.partition("=")
        if not word.strip():  # "$ARGS" of a shell script, where the variable is empty
            continue
        if _is_flag(word):
            meant, takes_next = _of_flag(word, following)
            if not meant:
                return None, []
            rest = rest[takes_next:]
            done += meant
            shown = meant if word == stray else shown
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
            elif following is not None and (is_open or (key in TEXTS and _is_one_text(value, following))):
                rest[0] = f"{word}{'' if is_open and word[-1] in ',:' else ' '}{following}"
            else:
                done.append(word)
        elif word.strip(":") in _keys() and rest and rest[0].startswith("="):
            value = rest.pop(0).lstrip("=") or (rest.pop(0) if rest else "")
            done.append(f"{word.strip(':')}={value}")
        elif word.rstrip(":") in _keys() and following is not None:
            done.append(f"{word.rstrip(':')}={rest.pop(0)}")
        elif word.partition(":")[0] in _keys() and word.partition(":")[2]:
            done.append("{}={}".format(*word.partition(":")[::2]))
        elif meant := of_word(word) or _of_path(word):
            done += meant
        else:
            return None, []
    return done, shown


def _of_flag(word: str, following: str | None) -> tuple[list[str], int]:
    """The words that a flag stands for, and how many words after it belong to it. ([], 0): nothing is near."""
    name, sign, value = word.lstrip(DASHES).partition("=")
    if not sign and (option := difflib.get_close_matches(f"--{name}", FLAGS, n=1, cutoff=0.8)):
        return option, 0
    if not sign and f"-{name}" in FLAGS:  # written with another dash
        return [f"-{name}"], 0
    if switch := of_word(name.lower()):  # --fp16, --cpu
        return switch, 0
    off = name.startswith("no-") or name.startswith("no_")
    close = setting_like(name[3:] if off else name)
    if not close:
        return [], 0
    if sign or (following is not None and not off):
        return meant_by(close[0], value if sign else following or ""), 0 if sign else 1
    knob = KNOBS.get(close[0])
    is_switch = (knob is not None and knob.type == "bool") or "true" in VALUES.get(close[0].rpartition(".")[2], {})
    if off:
        return (meant_by(close[0], "false") if is_switch else []), 0
    return meant_by(close[0], "true" if is_switch else example(close[0])), 0


def _keys() -> set[str]:
    return {*KNOBS, *groups()}


def _is_one_text(value: str, following: str) -> bool:
    """Whether the shell has cut a text in two, as of data.root=my photos."""
    separate = of_word(following) or (_of_path(following) and path_in(value).exists())
    return not separate or path_in(f"{value} {following}").exists()


def _of_path(word: str) -> list[str]:
    """A folder of images, or a table of them, by itself."""
    path = path_in(word)
    if path.is_dir():
        return ["data=image_folder", f"data.root={word}"]
    return ["data=table", f"data.table={word}"] if path.is_file() and path.suffix in (".csv", ".tsv") else []
