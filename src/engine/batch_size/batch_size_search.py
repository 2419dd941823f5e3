"""data.batch_size=auto: the order in which sizes are tried, the lines that say so, and the run's record of its choice.

src/engine/batch_size/batch_size.py measures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import write_json
from src.engine.runs.plain_values import check, limited, read_json
from src.engine.runs.text import printable

log = logging.getLogger(__name__)

FIRST = 2  # the size tried first; BatchNorm cannot always normalise a single image
HEADER = f"{'batch size':>10}{'peak MiB':>11}{'images/s':>11}"


class Measured(NamedTuple):
    """A training step of some size: what it holds without images, the most it held, and its speed."""

    fixed_mib: int
    peak_mib: int
    images_per_second: float


@dataclass(frozen=True)
class Attempt:
    """One row of the table. Without a speed it was not run, without a peak it ran out of memory."""

    batch_size: int
    peak_mib: int | None
    images_per_second: float | None
    fits: bool
    verdict: str

    def row(self) -> str:
        peak = "-" if self.peak_mib is None else f"{self.peak_mib}"
        speed = "-" if self.images_per_second is None else f"{self.images_per_second:.1f}"
        return f"{self.batch_size:>10}{peak:>11}{speed:>11}   {self.verdict}"


def search(
    measure: Callable[[int], Measured | None], allowed_mib: int, largest: int, *, extrapolate: bool
) -> list[Attempt]:
    """Doubles the size until it does not fit, then bisects; prints each attempt and returns them all.

    measure: runs steps of a size; None where they run out of memory. largest: the largest size to try. extrapolate: skip a
    size whose peak, extrapolated from smaller ones, would be more than is allowed, since a CPU that runs out of memory
    swaps, or its process is killed. Above 8 the sizes are multiples of 8, and the result is within about an eighth.
    """
    attempts: list[Attempt] = []
    measured: dict[int, Measured] = {}

    def attempt(size: int) -> Attempt:
        if extrapolate and measured and (expected := _expected_peak(measured, size)) > allowed_mib:
            return Attempt(size, expected, None, False, "not tried: the peak is an estimate, and too much")
        reading = measure(size)
        if reading is None:
            return Attempt(size, None, None, False, "out of memory")
        measured[size] = reading
        fits = reading.peak_mib <= allowed_mib
        return Attempt(size, reading.peak_mib, reading.images_per_second, fits, "fits" if fits else "too much")

    log.info(HEADER)
    largest = _even(largest)
    low, high = 0, None  # the largest that fits, the smallest that does not
    while True:
        size = min(2 * low or FIRST, largest) if high is None else _even((low + high) // 2)
        if size <= low or (high is not None and high - low <= low // 8):
            return attempts
        attempts.append(attempt(size))
        log.info(attempts[-1].row())
        if attempts[-1].fits:
            low = size
        else:
            high = size


def _even(size: int) -> int:
    """Above 8 a multiple of 8: tensor cores and vector units work in such units."""
    return size if size <= 8 else size - size % 8


def _expected_peak(measured: dict[int, Measured], size: int) -> int:
    """Activations grow in proportion to the batch, from what a step holds without images."""
    fixed = measured[min(measured)].fixed_mib  # the first reading: later ones hold what malloc kept of earlier attempts
    largest = max(measured)
    return fixed + (measured[largest].peak_mib - fixed) * size // largest


def largest_fitting(attempts: Sequence[Attempt]) -> Attempt | None:
    return max((attempt for attempt in attempts if attempt.fits), key=lambda attempt: attempt.batch_size, default=None)


def smallest_as_fast(attempts: Sequence[Attempt]) -> int:
    """The smallest size within 5 % of the quickest; beyond it, larger batches save no time."""
    speeds = {attempt.batch_size: attempt.images_per_second for attempt in attempts if attempt.fits}
    return min(size for size, speed in speeds.items() if speed >= 0.95 * max(speeds.values()))


def remember(folder: Path, batch_size: int, attempts: Sequence[Attempt]) -> None:
    """Writes batch_size.json into the run's folder. batch_size: over all devices."""
    write_json(
        folder / "batch_size.json", {"batch_size": batch_size, "tried": [asdict(attempt) for attempt in attempts]}
    )


def chosen_batch_size(folder: Path) -> int | None:
    """What data.batch_size=auto chose when the run began; None if it has not chosen yet."""
    path = folder / "batch_size.json"
    if not path.exists():
        return None
    try:
        values = read_json(path)
        check(chosen := _Chosen(values.get("batch_size")))  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(
            f"{printable(path)} cannot be read: {printable(str(error)[:200])}",
            where=printable(path.absolute()),
            why="it says which batch size the run found when it began",
            fix="copy it back from a backup",
            code=ExitCode.DATA,
        ) from error
    return chosen.batch_size


@dataclass(frozen=True)
class _Chosen:
    batch_size: int = limited(range=(1, 10**6))
