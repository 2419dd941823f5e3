"""Values of any kind as numbers on an axis: a sweep's parameters and its metric. Used by its plots and importances."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from src.engine.sweeps.sweep_journal import TrialRecord

LOG_FROM = 50  # use a log axis if all values are positive and max/min is larger
FEW = 5  # values that an axis marks themselves; of more it marks round numbers between them


@dataclass(frozen=True)
class Scale:
    """Finite numbers, as they are or as their log10; everything else is a category, whose number is its place."""

    values: tuple[Any, ...]  # the different ones: numbers from the smallest on, categories in the order they came
    numeric: bool

    @classmethod
    def of(cls, values: Iterable[Any]) -> Scale:
        """values: at least one."""
        different = list({_identity(value): value for value in values}.values())
        numeric = all(_is_number(value) for value in different)
        return cls(tuple(sorted(different) if numeric else different), numeric)

    @property
    def log(self) -> bool:
        return self.numeric and self.values[0] > 0 and self.values[-1] > LOG_FROM * self.values[0]

    def number(self, value: Any) -> float:
        if not self.numeric:
            return float([_identity(one) for one in self.values].index(_identity(value)))
        return math.log10(value) if self.log else float(value)

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number."""
        return self.number(self.values[0]), self.number(self.values[-1])

    def ticks(self, apart: float) -> list[tuple[float, str]]:
        """The numbers to be marked, with their texts.

        apart: the room of a mark, as a share of the axis; a mark in the room of another is left out.
        """
        low, high = self.ends
        kept: list[tuple[float, str]] = []
        for value in self.values if not self.numeric or len(self.values) <= FEW else self._round_values():
            number = self.number(value)
            if not kept or number - kept[-1][0] >= apart * (high - low):
                kept.append((number, shown(value)))
        return kept

    def _round_values(self) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        first, last = self.values[0], self.values[-1]
        if self.log:
            ticks = LogLocator(subs=(1.0,) if last > 1000 * first else (1.0, 2.0, 5.0)).tick_values(first, last)
        else:
            whole = all(isinstance(value, int) for value in self.values)
            ticks = MaxNLocator(FEW, integer=whole).tick_values(first, last)
        return [float(tick) for tick in ticks if first <= tick <= last]

    def __str__(self) -> str:
        """'0.0001 to 0.1' or 'linear, mlp'."""
        if self.numeric and len(self.values) > FEW:
            return f"{shown(self.values[0])} to {shown(self.values[-1])}"
        return ", ".join(shown(value) for value in self.values)


def scales_of(trials: Sequence[TrialRecord]) -> dict[str, Scale]:
    """The parameters that differ among the trials, in the order they came. A trial may lack one: a key added with +."""
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    scales = {name: Scale.of(trial.params[name] for trial in trials if name in trial.params) for name in names}
    return {name: scale for name, scale in scales.items() if len(scale.values) > 1}


def numbers(trials: Iterable[TrialRecord], name: str, scale: Scale) -> list[float]:
    """One parameter of the trials; nan for a trial that lacks it."""
    return [scale.number(trial.params[name]) if name in trial.params else math.nan for trial in trials]


def exact(value: Any) -> str:
    """The value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shown(value: Any) -> str:
    """The value for people: fractions with four digits."""
    if not isinstance(value, float):
        return exact(value)
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def duration(seconds: float) -> str:
    """'1.2 s', '3 min' or '2.5 h'."""
    if seconds < 60:
        return f"{round(seconds, 1):g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{round(seconds / 3600, 1):g} h"


def _identity(value: Any) -> float | str:
    """1 and 1.0 are the same, 1 and true are not."""
    return float(value) if _is_number(value) else exact(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
