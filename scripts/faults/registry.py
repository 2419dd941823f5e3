"""What a row of the matrix is, and the list of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from scripts.faults.injecting import Fault

TOPICS = ("kills", "files", "signals", "processes", "numbers", "images", "sweeps", "security")


class Impossible(Exception):
    """The fault cannot be made on this machine: it needs to mount a file system, for example."""


@dataclass(frozen=True)
class Guard:
    """What keeps a promise, and how it is switched off: by faults in every command of the row, or by words."""

    name: str
    faults: tuple[Fault, ...] = ()
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One promise and what is done to break it.

    test: called with a program of scripts/faults/programs.py; returns what was seen, in a few words, or raises
    AssertionError. quick: among those that every change has to pass. plain: whether the fault has a meaning for a plain
    Lightning script, to which it is done as well. guard: without which the row has to fail: its negative control.
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
        import_module(f"scripts.faults.{topic}")
    return [ROWS[number] for number in sorted(ROWS)]
