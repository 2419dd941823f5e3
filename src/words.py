"""The words of evaluate, predict and export: key=value, checked before torch is imported.

Text is taken as the shell gave it: everything behind the first '=' belongs to it, whatever signs it holds.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

import yaml

from src.config import Data
from src.errors import ExitCode, UserError
from src.other_names import OF_PROGRAMS, closest, option_like
from src.text import path_in, printable
from src.user_command import corrected

Words = TypeVar("Words")

# Settings of the data that the model brings itself, or that are about training only.
WITHOUT_EFFECT = {
    "image_size": "the model sees images of the size that it was trained on",
    "crop_ratio": "the model's own preprocessing is used",
    "bits": "the model's own number is used",
    "augment": "images are augmented for training only",
    "val_fraction": "the run's own split is used",
    "test_fraction": "the run's own split is used",
}


def read_words(
    schema: type[Words], words: Sequence[str], command: str, usage: str, needed: str, data: bool = False
) -> tuple[Words, dict[str, Any]]:
    """key=value words as the dataclass `schema`, and the data.KEY=VALUE words, which change a run's settings.

    schema: its fields may have `options` or `range` (lowest, highest) in their metadata. command: such as 'src.evaluate',
    for messages; usage: the text that --help prints; needed: a word that must be there; data: whether the command takes
    data. settings. Raises UserError.
    """
    if not words or any(word in ("-h", "--help") for word in words):
        print(usage.strip())
        sys.exit(ExitCode.OK if words else ExitCode.CONFIG)
    own = {knob.name: knob for knob in fields(schema)}  # type: ignore[arg-type]
    others = {f"data.{knob.name}": knob for knob in fields(Data)} if data else {}
    values: dict[str, Any] = {}
    for place, word in enumerate(words):
        key, sign, text = word.partition("=")
        if not sign or key.startswith("-"):
            raise _no_key(words, place, [*own, *others])
        if key not in own and key not in others:
            raise _unknown(key, text, command, list(own), list(others))
        if key in values:
            raise UserError(
                f"{key} is given twice",
                where=f"{printable(key)}={printable(values[key])} and {printable(word)}",
                why=f"{command} takes one value of it",
                fix=corrected(word),
            )
        knob, types = (own[key], schema) if key in own else (others[key], Data)
        values[key] = _value(key, knob, typing.get_type_hints(types)[knob.name], text)
    if needed not in values:
        raise UserError(
            f"{needed}= is missing", why=f"{command} cannot do without it", fix=f"python -m {command} --help"
        )
    return schema(**{key: value for key, value in values.items() if key in own}), {
        key: value for key, value in values.items() if key in others
    }


def _value(key: str, knob: Field[Any], kind: Any, text: str) -> Any:
    """The text as the type of the field."""
    if knob.name in WITHOUT_EFFECT and key.startswith("data."):
        raise UserError(
            f"{key}={printable(text)} has no effect here", why=WITHOUT_EFFECT[knob.name], fix=corrected(remove=[key])
        )
    kinds = {kind} if typing.get_origin(kind) is list else set(typing.get_args(kind)) or {kind}
    options, limits = knob.metadata.get("options"), knob.metadata.get("range")
    if options:
        return _chosen(key, text, options)
    if str in kinds:
        if not text:
            raise UserError(
                f"{key}= is empty", why="a name or a path is written behind the sign", fix=corrected(remove=[key])
            )
        return str(path_in(text)) if text.startswith("~") else text
    if type(None) in kinds and text == "null":
        return None
    example = _example(knob, limits)
    if kinds & {int, float}:
        whole = int in kinds
        try:
            number = int(text) if whole else float(text)
            if limits and not limits[0] <= number <= limits[1]:
                raise ValueError
        except ValueError as error:
            allowed = f"a{' whole' if whole else ''} number{' from {} to {}'.format(*limits) if limits else ''}"
            raise _out_of_range(key, text, allowed, example) from error
        return number
    try:
        value = yaml.safe_load(text)  # a list, or what takes several types; checked with the whole of the settings
    except yaml.YAMLError as error:
        raise _out_of_range(key, text, f"such as {example}", example) from error
    if typing.get_origin(kind) is list and not isinstance(value, list):
        raise _out_of_range(key, text, f"such as {example}", example)
    return value


def _out_of_range(key: str, text: str, allowed: str, example: Any) -> UserError:
    return UserError(
        f"{key}={printable(text)} is out of range", why=f"{key} is {allowed}", fix=corrected(f"{key}={example}")
    )


def _example(knob: Field[Any], limits: tuple[int, int] | None) -> Any:
    value = knob.default_factory() if knob.default_factory is not MISSING else knob.default
    if value is None or value is MISSING:
        value = limits[0] if limits else 2
    return str(value).replace(" ", "")


def _chosen(key: str, text: str, options: Sequence[str]) -> str:
    if text in options:
        return text
    close = option_like(key, text, options)
    raise UserError(
        f"{key}={printable(text)} is not a choice" + (f"; did you mean {key}={close}?" if close else ""),
        why=f"{key} takes one of: {', '.join(options)}",
        fix=corrected(f"{key}={close or options[0]}"),
    )


def _unknown(key: str, text: str, command: str, own: list[str], others: list[str]) -> UserError:
    close = _closest(key, [*own, *others])
    takes = ", ".join(own) + (", and data. settings" if others else "")
    return UserError(
        f"{printable(key)} is not a setting of {command}" + (f"; did you mean {close}?" if close else ""),
        why=f"it takes {takes}",
        fix=corrected(f"{close}={text}", remove=[key]) if close else corrected(remove=[key]),
    )


def _closest(key: str, known: list[str]) -> str | None:
    """The known key that was meant, by its last part: data.batchsize for batch_size, and the other way round."""
    return next(iter(closest(key.lstrip("-"), known, OF_PROGRAMS)), None)


def _no_key(words: Sequence[str], place: int, known: list[str]) -> UserError:
    """A flag (--run x, --run=x), or a word without a sign: all of them as the key=value that was meant."""
    wrong, meant, shown = [], [], ""
    while place < len(words):
        word = words[place]
        key, sign, text = word.partition("=")
        place += 1
        if sign and not key.startswith("-"):
            continue
        parts = [word]
        if not sign and place < len(words) and "=" not in words[place] and not words[place].startswith("-"):
            text = words[place]
            parts.append(text)
            place += 1
        shown = shown or " ".join(map(printable, parts))
        wrong += parts
        name = _closest(key, known)
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
