"""Flags and stray words on the command line of src.train: what they were meant to be.

    --batch-size 4   data.batch_size 4   data.batch_size = 4   data.batch_size: 4     is data.batch_size=4
    data.root=my photos   'data.root=my photos' (with cmd.exe's quotes)               is the word in the shell's quotes
    photos/   sgd   debug                                       is data.root=photos/, optimizer=sgd, debug=true

src/word_checks.py calls `check_flags` and `check_strays`. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from src.config import known_keys
from src.errors import ExitCode, UserError
from src.hydra_words import TEXTS
from src.suggestions import HELP, VALUES, choices, example, groups, knob_of, meant_by, setting_like
from src.user_command import rewritten, typed_words

# Hydra's own options, and those that take the next word.
FLAGS = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m")
WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--experimental-rerun", "--info", "-i", "--shell-completion", "-sc"),
)
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # a web page makes other dashes of --
QUOTES = "'\"\u2018\u2019\u201c\u201d"


def settings_of(words: Sequence[str]) -> list[str]:
    """The words without Hydra's options and their values."""
    return split(words)[1]


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


def _is_flag(word: str) -> bool:
    return word[:1] != "" and word[0] in DASHES and len(word) > 1


def check_flags(words: Sequence[str]) -> None:
    """--batch-size 4 becomes data.batch_size=4."""
    unknown = [word for word in settings_of(words) if _is_flag(word)]
    if not unknown:
        _check_cfg(words)
        return
    mended, understood, skip = [], True, False
    for place, word in enumerate(words):
        if skip:
            skip = False
            continue
        if word not in unknown:
            mended.append(word)
            continue
        following = words[place + 1] if place + 1 < len(words) else None
        takes_next = following is not None and not _is_flag(following) and "=" not in following
        instead, skip = _of_flag(word, following if takes_next else None)
        understood &= bool(instead)
        mended += instead
    if "--help" in mended:
        mended = ["--help"]
    raise UserError(
        f"{unknown[0]} is not an option"
        + (f"; did you mean {' '.join(_of_flag(unknown[0], _after(words, unknown[0]))[0])}?" if understood else ""),
        why="a setting is key=value, without dashes; options are --help, -m (a sweep), --cfg job (all settings)",
        fix=rewritten(mended) if understood else HELP,
        code=ExitCode.USAGE,
    )


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


def _after(words: Sequence[str], word: str) -> str | None:
    following = words[words.index(word) + 1 : words.index(word) + 2]
    return following[0] if following and not _is_flag(following[0]) and "=" not in following[0] else None


def _of_flag(word: str, following: str | None) -> tuple[list[str], bool]:
    """The words that a flag stands for, and whether that takes the following word. None: [], nothing is near."""
    name, sign, value = word.lstrip(DASHES).partition("=")
    if name.lower() in ("help", "hlp", "h", "?", "usage", "man"):
        return ["--help"], False
    if not sign and (option := difflib.get_close_matches(f"--{name}", FLAGS, n=1, cutoff=0.8)):
        return option, False
    if not sign and f"-{name}" in FLAGS:  # written with another dash
        return [f"-{name}"], False
    close = setting_like(name.replace("-", "_"))
    if not close:
        return [], False
    key = close[0]
    if not sign and following is not None:
        return meant_by(key, following), True
    if not sign:  # such as --debug, --pretrained
        knob = knob_of(key)
        value = "true" if knob is not None and (knob.type == "bool" or "true" in VALUES.get(key, {})) else ""
        value = value or ("true" if key in VALUES else example(key))
    if name.lower() in choices(key):  # --fp16, --bf16
        value = name.lower()
    return meant_by(key, value), False


def check_strays(settings: Sequence[str]) -> None:
    """Words without a =, mostly a value that the shell cut off its key."""
    strays = [word for word in settings if "=" not in word or word.startswith("=") or word[0] in QUOTES]
    if not strays:
        return
    stray = strays[0]
    if stray.startswith(("~", "=")) and not _is_value(stray, settings):
        return  # src/word_checks.py says what is wrong with it
    mended = _joined(settings)
    why = "a setting is key=value without blanks around the =; a value with blanks is quoted for the shell"
    if stray.lower().rstrip("?") in ("help", "usage", "h", "/", "/h"):
        raise UserError(f"{stray!r} is not a setting", why=why, fix=HELP)
    options = [word for word in typed_words() if word not in settings]
    raise UserError(
        f"{stray!r} cannot be read: it is not key=value",
        why=why,
        fix=rewritten([*options, *mended]) if mended is not None else HELP,
    )


def _is_value(stray: str, settings: Sequence[str]) -> bool:
    """Whether `=4` follows its key."""
    before = settings[settings.index(stray) - 1] if settings.index(stray) else ""
    return stray.startswith("=") and before in _keys()


def _joined(settings: Sequence[str]) -> list[str] | None:
    """The settings with every stray word put where it belongs; None where that is not clear."""
    done: list[str] = []
    rest = list(settings)
    while rest:
        word = rest.pop(0)
        if word[0] in QUOTES:  # cmd.exe hands single quotes on
            while rest and word[-1] not in QUOTES and "=" not in rest[0]:
                word += " " + rest.pop(0)
            word = word.strip(QUOTES)
            rest.insert(0, word)
            if not word:
                return None
        elif "=" in word and not word.startswith("="):
            key, _, value = word.partition("=")
            is_open = sum(map(value.count, "[{(")) > sum(map(value.count, "]})"))
            if value == "" and rest and "=" not in rest[0]:
                done.append(f"{key}={rest.pop(0)}")
            elif rest and "=" not in rest[0] and is_open:
                rest[0] = f"{word}{'' if word[-1] in ',:' else ' '}{rest[0]}"
            elif rest and "=" not in rest[0] and key in TEXTS and not _meant_by_stray(rest[0]):
                rest[0] = f"{word} {rest[0]}"
            else:
                done.append(word)
        elif word.strip(":") in _keys() and rest and rest[0].startswith("="):
            value = rest.pop(0).lstrip("=") or (rest.pop(0) if rest else "")
            done.append(f"{word.strip(':')}={value}")
        elif word.rstrip(":") in _keys() and rest and "=" not in rest[0]:
            done.append(f"{word.rstrip(':')}={rest.pop(0)}")
        elif word.partition(":")[0] in _keys() and word.partition(":")[2]:
            done.append("{}={}".format(*word.partition(":")[::2]))
        elif meant := _meant_by_stray(word):
            done += meant
        elif word not in ("train", "src.train", "python"):
            return None
    return done


def _keys() -> set[str]:
    return {*known_keys(), *groups()}


def _meant_by_stray(word: str) -> list[str]:
    """A choice, a switch or a folder by itself."""
    for group in groups():
        if word in choices(group) and word != "default":
            return [f"{group}={word}"]
    if (knob := knob_of(word)) is not None and knob.type == "bool":
        return [f"{word}=true"]
    if word in ("photos", "images") or not Path(word).exists():
        return []
    return ["data=image_folder", f"data.root={word}"] if Path(word).is_dir() else []
