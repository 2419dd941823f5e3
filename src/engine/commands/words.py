"""The words of evaluate, predict and export: key=value, checked before torch is imported.

Text is taken as the shell gave it: everything after the first '=' belongs to it, whatever characters it has.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any, TypeVar

import yaml

from src.engine.commands.config_checks import check_knob
from src.engine.commands.knobs import example_of, knobs_of
from src.engine.commands.schema import KNOBS
from src.engine.commands.suggestions import KINDS, OF_PROGRAMS, closest, did_you_mean
from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import path_in, printable

Words = TypeVar("Words")

WITHOUT_EFFECT = {  # settings of the data that the model brings itself, or that are about training only
    "data.image_size": "the model sees images of the size that it was trained on",
    "data.crop_ratio": "the model's own preprocessing is used",
    "data.bits": "the model's own number is used",
    "data.keep_side": "images are read as large as the model was trained on",
    "data.augment": "images are augmented for training only",
    "data.val_fraction": "the run's own split is used",
    "data.test_fraction": "the run's own split is used",
}
ABOUT_OTHER_IMAGES = {  # settings without effect on the run's own images
    "data.on_bad_image": "of the run's own images, what cannot be read any more is left out and counted",
    "data.layout": "it says how the folders below data.root are read",
}


def read_words(
    schema: type[Words], words: Sequence[str], command: str, usage: str, needed: str = "", data: bool = False
) -> tuple[Words, dict[str, Any]]:
    """key=value words as the dataclass `schema`, and the data.KEY=VALUE words, which change a run's settings.

    schema: its fields are made by choice, number and value of knobs.py. command: such as 'src.evaluate', for messages;
    usage: what --help prints; needed: a word that must be there; data: whether the command takes data. settings. Raises
    UserError.
    """
    if not words or any(word in ("-h", "--help") for word in words):
        print(usage.strip())
        sys.exit(ExitCode.OK if words else ExitCode.CONFIG)
    knobs = knobs_of(schema)
    if data:
        knobs |= {key: knob for key, knob in KNOBS.items() if key.startswith("data.")}
    values: dict[str, Any] = {}
    for place, word in enumerate(words):
        key, sign, text = word.partition("=")
        if not sign or key.startswith("-"):
            raise _no_key(words, place, list(knobs))
        if key not in knobs:
            raise _unknown(key, text, command, list(knobs))
        if key in values:
            raise UserError(
                f"{key} is given twice",
                where=f"{printable(key)}={printable(values[key])} and {printable(word)}",
                why=f"{command} takes one value of it",
                fix=corrected(word),
            )
        values[key] = _value(key, knobs[key], text)
    if needed and needed not in values:
        fix = f"python -m {command} --help"
        raise UserError(f"{needed}= is missing", why=f"{command} cannot do without it", fix=fix)
    own = {key: value for key, value in values.items() if not key.startswith("data.")}
    return schema(**own), {key: value for key, value in values.items() if key not in own}


def check_effects(changes: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a setting that has no effect on the run's own images. source: the run's data.source."""
    if source not in ("image_folder", "table") or "data.root" in changes or "data.table" in changes:
        return
    for key, why in ABOUT_OTHER_IMAGES.items():
        if key in changes:
            raise UserError(f"{key} has no effect here", why=why, fix=corrected(remove=[key]))


def _value(key: str, knob: Field[Any], text: str) -> Any:
    """The text as the type of the field. Raises UserError."""
    if key in WITHOUT_EFFECT:
        raise UserError(
            f"{key}={printable(text)} has no effect here", why=WITHOUT_EFFECT[key], fix=corrected(remove=[key])
        )
    kind, _, null = str(knob.type).partition(" | ")
    if kind == "str":
        if not text:
            raise UserError(f"{key}= is empty", why="a name or a path stands after the =", fix=corrected(remove=[key]))
        value: Any = str(path_in(text)) if text.startswith("~") else text
    elif null and text == "null":
        return None
    else:
        try:  # a list, or a value of several types, is checked with the whole of the settings
            value = {"int": int, "float": float}.get(kind, yaml.safe_load)(text)
            if kind.startswith("list") and not isinstance(value, list):
                raise ValueError
        except (ValueError, yaml.YAMLError) as error:
            low, high = knob.metadata.get("range", (None, None))
            allowed = KINDS.get(kind, f"such as {example_of(knob)}") + (
                f" from {low} to {high}" if low is not None else ""
            )
            raise UserError(
                f"{key}={printable(text)} is out of range",
                why=f"{key} is {allowed}",
                fix=corrected(f"{key}={example_of(knob)}"),
            ) from error
    check_knob(key, knob, value)
    return value


def _unknown(key: str, text: str, command: str, known: list[str]) -> UserError:
    close = closest(key, known, OF_PROGRAMS)[:1]
    own = [name for name in known if not name.startswith("data.")]
    return UserError(
        f"{printable(key)} is not a setting of {command}{did_you_mean(*close)}",
        why=f"it takes {', '.join(own)}" + (", and data. settings" if len(own) < len(known) else ""),
        fix=corrected(*(f"{name}={text}" for name in close), remove=[key]),
    )


def _no_key(words: Sequence[str], place: int, known: list[str]) -> UserError:
    """For flags (--run x, --run=x) and words without a sign: all of them as the key=value that was meant."""
    wrong, meant, rest = [], [], list(words[place:])
    shown = ""
    while rest:
        word = rest.pop(0)
        key, sign, text = word.partition("=")
        if sign and not key.startswith("-"):
            continue
        parts = [word]
        if not sign and rest and "=" not in rest[0] and not rest[0].startswith("-"):
            text = rest.pop(0)
            parts.append(text)
        shown = shown or " ".join(map(printable, parts))
        wrong += parts
        name = next(iter(closest(key.lstrip("-"), known, OF_PROGRAMS)), None)
        if name and text:
            meant.append(f"{name}={text}")
        elif not word.startswith("-"):  # a path alone
            meant += [f"{_kind(path, known)}={path}" for path in parts]
    return UserError(
        f"{shown!r} cannot be read", why="a setting is key=value, without dashes", fix=corrected(*meant, remove=wrong)
    )


def _kind(path: str, known: list[str]) -> str:
    """What a path without its key is given as: a run, a model/ folder, or images."""
    if (path_in(path) / "model.json").is_file() and "model" in known:
        return "model"
    return "run" if (path_in(path) / "config.yaml").is_file() or "images" not in known else "images"
