"""The kinds of rows of which src/rules.py makes its table, and rooms theirs. How a row's texts are written is said there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING
from typing import Any

from src.engine.commands.knobs import example_of
from src.engine.commands.schema import KNOBS, Condition, Config, Rule, value_of
from src.engine.memory.gpus import device_count
from src.engine.own import is_own


def wrong(key: str, is_right: Callable[[Any], bool], what: str, found: str = "is out of range") -> Rule:
    """A value that no range can describe."""
    fix = f"{key}={example_of(KNOBS[key])}"
    return Rule(lambda c: not is_right(value_of(c, key)), f"<{key}> {found}", f"{key} is {what}", fix)


def clash(key: str, other: str, broken: Condition, why: str, fix: str) -> Rule:
    return Rule(broken, f"<{key}> does not go with <{other}>", why, fix)


def unread(key: str, beside: str, is_read: Condition, why: str, use: str = "", is_error: bool = False) -> Rule:
    """A setting with another value than its default that has no effect unless `is_read`. use: words that give it one."""
    knob = KNOBS[key]
    default = knob.default if knob.default_factory is MISSING else knob.default_factory()
    fix = f"{use} <{key}>" if use else f"~{key}"
    found = f"<{key}> has no effect with {beside}"
    return Rule(lambda c: value_of(c, key) not in (None, default) and not is_read(c), found, why, fix, is_error)


def read_by(key: str, users: tuple[str, ...], is_error: bool = True) -> Rule:
    section = key.partition(".")[0]
    why = f"only {section}={f' or {section}='.join(users)} looks at it"

    def is_read(c: Config) -> bool:
        return value_of(c, section) in users or is_own(value_of(c, section))

    return unread(key, f"<{section}>", is_read, why, f"{section}={users[0]}", is_error)


def one_machine(strategy: str, instead: str) -> Rule:
    return clash(
        "strategy",
        "trainer.num_nodes",
        lambda c: c.strategy.name == strategy and c.trainer.num_nodes != 1,
        "<strategy> is one process, and so on one machine",
        f"trainer.num_nodes=1 | strategy={instead}",
    )


def is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is kind for item in value)


def devices(c: Config) -> int:
    """Over all machines."""
    return device_count(c.trainer) * c.trainer.num_nodes
