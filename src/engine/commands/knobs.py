"""How a setting is declared in a dataclass: its default, its choices or range, an example. Imports nothing of src.

The schemas are src/config.py and the words of the front doors; src/engine/commands/config_checks.py checks their values.
"""

from __future__ import annotations

from dataclasses import Field, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

ANY = 10**9  # no upper limit that a user meets


def choice(*options: str, default: str | None = MISSING, own: str = "") -> Any:
    """A text field that takes one of the options. own: where it also takes the name of the owner's code, such a name."""
    return field(default=default, metadata={"options": options, "own": own})


def number(default: Any, low: float, high: float, example: Any = None) -> Any:
    """A number from low to high. example: a value for suggested commands; None: the default is one."""
    return field(default=default, metadata={"range": (low, high), "example": example})


def value(default: Any, example: Any, own: str = "") -> Any:
    """A text that must not be empty, or a value that src/rules.py checks. example: of it, for suggested commands. own: see
    choice."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"example": example})
    return field(default=default, metadata={"example": example, "own": own})


def arguments() -> Any:
    """Arguments of one of the owner's parts, by name."""
    return field(default_factory=dict)


def example_of(knob: Field[Any]) -> Any:
    """A value that the knob takes, for suggested commands."""
    return knob.default if knob.metadata.get("example") is None else knob.metadata["example"]


def knobs_of(schema: Any, prefix: str = "") -> dict[str, Field[Any]]:
    """The fields of a schema and of its sections by their keys, such as data and data.batch_size; none of another value."""
    knobs = {}
    for knob in fields(schema) if is_dataclass(schema) else ():
        knobs[prefix + knob.name] = knob
        knobs |= knobs_of(knob.default_factory, f"{prefix}{knob.name}.")
    return knobs
