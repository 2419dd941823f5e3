"""Goal: what the trials of a sweep are judged by. Imports neither ray nor torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# In place of nan and inf for schedulers and searches, which compare and average values: a single nan would spoil them all.
WORST = 1e30


@dataclass(frozen=True)
class Goal:
    """The metric of a sweep, and whether more of it is better (mode=max) or less (mode=min)."""

    metric: str
    mode: str

    @property
    def sign(self) -> int:
        """sign * value is the greater the better."""
        return 1 if self.mode == "max" else -1

    @property
    def worst(self) -> float:
        """A finite value below which no trial comes."""
        return -self.sign * WORST

    def finite(self, value: float | None) -> float:
        """The value as schedulers and searches are told it: the worst one for None, nan, inf and -inf."""
        return value if value is not None and math.isfinite(value) else self.worst

    def best(self, values: Iterable[float]) -> float | None:
        """The best of the finite values; None where there is none."""
        finite = [value for value in values if math.isfinite(value)]
        return max(finite, key=lambda value: self.sign * value, default=None)
