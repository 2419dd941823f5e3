"""JSON and YAML files from anybody: read as plain values of bounded size, and checked against dataclasses.

Duplicate keys, tags and aliases are refused, so that a small file cannot become a large value. Nothing here imports torch.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Hashable
from dataclasses import MISSING, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 32 * 2**20  # of JSON: 100,000 classes have some MiB
MOST_BYTES_OF_YAML = 2**17  # PyYAML reads 100 KB a second
DEEPEST = 16
LARGEST = 1e300  # of a number without a range


def limited(default: Any = MISSING, **limits: Any) -> Any:
    """A field with a range=(lowest, highest) or options=(...) of each value in it, or a length=(least, most)."""
    return field(default=default, metadata=limits)


def read_json(path: Path) -> dict[str, Any]:
    """An object. nan and infinity, which are no JSON but in older runs' files, become None. Raises ValueError, OSError."""
    try:
        value = json.loads(_text(path, MOST_BYTES), object_pairs_hook=_unique, parse_constant=lambda text: None)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it does not hold an object")
    return value


def read_yaml(path: Path) -> Any:
    """Raises ValueError, yaml.YAMLError, OSError."""
    return yaml.load(_text(path, MOST_BYTES_OF_YAML), Loader=_PlainLoader)


def check(values: Any, name: str = "") -> None:
    """Raises ValueError unless a dataclass holds what its fields declare: types, finite numbers, limits."""
    hints = typing.get_type_hints(type(values))
    for knob in fields(values):
        _check(getattr(values, knob.name), hints[knob.name], f"{name}{knob.name}", knob.metadata)


def _check(value: Any, kind: Any, name: str, limits: typing.Mapping[str, Any]) -> None:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is not None:
            _check(value, inner[0], name, limits)
        return
    if kind is Any:
        return
    right = type(value) in (int, float) if kind is float else type(value) is (origin or kind)
    if not right:
        raise ValueError(f"{name} is {str(value)[:60]!r}, which is no {(origin or kind).__name__}")
    least, most = limits.get("length", (0, 10**6))
    if origin and not least <= len(value) <= most:
        raise ValueError(f"{name} has {len(value)} values, not {least} to {most}")
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise ValueError(f"{name} has {len(value)} values, not {len(kinds)}")
        for item, kind_of_item in zip(value, kinds, strict=True):
            _check(item, kind_of_item, name, limits)
    elif origin is dict:
        for key, item in value.items():
            _check(key, inner[0], name, {})
            _check(item, inner[1], f"{name}.{key}", limits)
    elif is_dataclass(value):
        check(value, f"{name}.")
    elif "options" in limits and value not in limits["options"]:
        raise ValueError(f"{name} is {str(value)[:60]!r}, not one of {', '.join(limits['options'])}")
    elif kind in (int, float):
        low, high = limits.get("range", (-LARGEST, LARGEST))
        if not low <= value <= high:  # true of nan as well
            raise ValueError(f"{name} is {value:g}, not from {low:g} to {high:g}")


def _text(path: Path, most: int) -> str:
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return content.decode("utf-8", "surrogateescape")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands in it twice")
    return result


class _PlainLoader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            raise yaml.YAMLError(f"an anchor, alias or tag: {event.start_mark}")
        if self._depth > DEEPEST:
            raise yaml.YAMLError("it is nested too deep")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        result = super().construct_mapping(node, deep)
        if len(result) < len(node.value):
            raise yaml.YAMLError(f"a key stands twice: {node.start_mark}")
        return result
