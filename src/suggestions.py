"""What was probably meant: the setting nearest to a mistyped one, and the key of a section that takes a value.

src/word_checks.py and src/command_line.py ask here. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from src import config
from src.errors import UserError
from src.hydra_words import key_of
from src.other_names import VALUES, closest, value_here
from src.text import as_typed, path_in
from src.user_command import is_typed, rewritten, typed_words

CONF = Path(__file__).resolve().parent.parent / "conf"
HELP = "python -m src.train --help"
ALL_KEYS = "settings are declared in src/config.py; the whole list with its values: python -m src.train --cfg job"

# The key of a section that is meant where the section is given a number.
NUMBERS = {"optimizer": "lr", "trainer": "max_epochs", "data": "batch_size", "freeze": "last_n"}


def groups() -> list[str]:
    """The config groups: folders of conf/ with a file per choice."""
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def knobs_of(section: str) -> Sequence[Field[Any]]:
    """The fields of a section's schema; none of a key that is no section."""
    knob = config.KNOBS.get(section)
    return fields(knob.default_factory) if knob is not None and is_dataclass(knob.default_factory) else ()  # type: ignore[arg-type]


def is_section(key: str) -> bool:
    return bool(knobs_of(key))


def setting_like(key: str) -> list[str]:
    """The settings and groups nearest to a key."""
    known = list(dict.fromkeys([*config.KNOBS, *groups()]))
    close = closest(key, known)
    # A section is no answer to a key, unless it is a group that can be chosen from.
    return [name for name in close if not is_section(name) or name in groups()]


def example(key: str) -> str:
    """A value that the setting takes, as it is typed: its default, or where that is null, one of the table's."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        value = OmegaConf.select(hydra.compose("train"), key)
    return as_typed(config.example(config.KNOBS[key]) if key in config.KNOBS else None if value is None else value)


def unknown_key(key: str) -> UserError:
    """The answer to a key that is no setting."""
    close = setting_like(key)[:2]
    word = next((word for word in typed_words() if key_of(word) == key), None)
    value = "" if word is None else word.partition("=")[2]
    fixes = [replaced(word, *meant) for guess in close if word is not None and (meant := meant_by(guess, value))]
    return UserError(
        f"{key} is not a setting" + (f"; did you mean {close[0]}?" if close else ""),
        why=ALL_KEYS,
        fix=list(dict.fromkeys(fixes)) or [HELP, *([f"{replaced(word)}   # without it"] if word else [])],
    )


def replaced(word: str, *instead: str) -> str:
    """The user's command with other words in the place of one."""
    return rewritten([other for one in typed_words() for other in (instead if one == word else (one,))])


def meant_by(setting: str, value: str) -> list[str]:
    """The words that give the value to a setting, or to a group or section: what the value is called here."""
    if is_section(setting):
        return [f"{setting}={value}"] if value in choices(setting) else of_section(setting, value)
    if setting == "resume" and path_in(value).exists():
        path = path_in(value)
        return [f"name={next((run for run in [path, *path.parents] if (run / 'config.yaml').exists()), path).name}"]
    source = ["data=image_folder"] if setting == "data.root" and not is_typed("data") else []
    return [*source, f"{setting}={value_here(setting, value)}"]


def of_section(section: str, value: str) -> list[str]:
    """The words that were probably meant by section=value; [] where nothing is near."""
    text = value.strip("'\"")
    if (here := value_here(section, text)) != text:
        return [f"{section}={here}"]
    if section == "memory" and text in ("true", "false"):
        return [f"memory.log={text}"]
    for knob in knobs_of(section):
        here = VALUES.get(knob.name, {}).get(text, text)
        if here in knob.metadata.get("options", ()) and knob.name not in ("name", "source"):
            return [f"{section}.{knob.name}={here}"]
    path = path_in(text)
    if section == "data" and text and path.exists():
        return ["data=image_folder", f"data.root={text}"] if path.is_dir() else ["data=table", f"data.table={text}"]
    if switch := of_word(text, but=section):
        return switch
    close = difflib.get_close_matches(text.lower(), choices(section), n=1, cutoff=0.6)
    if close:
        return [f"{section}={close[0]}"]
    if re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", text):
        return [f"{section}.{NUMBERS[section]}={text}"] if section in NUMBERS else []
    return [f"model.backbone={text}"] if section == "model" and text else []


def of_word(word: str, but: str = "") -> list[str]:
    """What a word by itself means: sgd is a choice of a group (not of the group `but`), cpu the value of one setting,
    debug a switch; [] where it is none of them."""
    for group in groups():
        if group != but and word in choices(group) and word != "default":
            return [f"{group}={word}"]
    if (knob := config.KNOBS.get(word)) is not None and knob.type == "bool":
        return [f"{word}=true"]
    keys = [key for key, knob in config.KNOBS.items() if word in knob.metadata.get("options", ())]
    return [f"{keys[0]}={word}"] if len(keys) == 1 else []


def not_a_choice(word: str, section: str, values: Sequence[str]) -> UserError:
    """The answer to section=value, or to section=value,value of a sweep, where the section has not all of the choices."""
    options = choices(section)
    wrong = next(value for value in values if value not in options)
    meant = of_section(section, wrong)
    if len(values) > 1:
        each = [[f"{section}={value}"] if value in options else of_section(section, value) for value in values]
        keys = {key_of(one[0]) for one in each if len(one) == 1}
        joined = ",".join(one[0].partition("=")[2] for one in each if one)
        meant = [f"{keys.pop()}={joined}"] if len(keys) == 1 and all(len(one) == 1 for one in each) else []
    keys_of_section = ", ".join(knob.name for knob in knobs_of(section))
    guess = f"; did you mean {' '.join(meant)}?" if meant else ""
    return UserError(
        f"{section}={wrong} is not a choice{guess}" if options else f"{section} is a section{guess}",
        where=str(CONF / section) if options else "src/config.py",
        why=f"{section} is one of: {', '.join(options)}" if options else f"its keys: {keys_of_section}",
        fix=replaced(word, *meant) if meant else HELP,
    )
