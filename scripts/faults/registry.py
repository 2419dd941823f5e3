"""The rows of the fault matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from scripts.faults.injecting import Fault

TOPICS = ("kills", "files", "signals", "processes", "numbers", "images", "sweeps", "security")


class Impossible(Exception):
    """This machine cannot produce the fault, for example because mounting a file system needs root."""


@dataclass(frozen=True)
class Guard:
    """The mechanism that keeps a promise, and how a negative control disables it: by faults or by overrides."""

    name: str
    faults: tuple[Fault, ...] = ()
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A promise and the fault that tries to break it.

    test: called with a Program; returns a short observation or raises AssertionError. quick: CI runs the row. plain: the
    fault also makes sense for the plain Lightning script. guard: with the guard disabled the row must fail.
    """

    number: int
    name: str
    promise: str
    injection: str
    topic: str
    quick: bool
    plain: bool
    guard: Guard | None
    test: Callable[..., str]


ROWS: dict[int, Row] = {}


def row(
    number: int,
    name: str,
    *,
    promise: str,
    injection: str,
    quick: bool = False,
    plain: bool = True,
    guard: Guard | None = None,
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Registers the decorated function as a row."""

    def register(test: Callable[..., str]) -> Callable[..., str]:
        assert number not in ROWS, f"two rows have the number {number}"
        topic = test.__module__.rpartition(".")[2]
        ROWS[number] = Row(number, name, promise, injection, topic, quick, plain, guard, test)
        return test

    return register


def all_rows() -> list[Row]:
    """Every row, in the order of the numbers."""
    for topic in TOPICS:
        if Path(__file__).with_name(f"{topic}.py").exists():  # sweeps may have been removed
            import_module(f"scripts.faults.{topic}")
    return [ROWS[number] for number in sorted(ROWS)]
