"""data.batch_size=auto: which sizes are tried, what is printed of them, and what a run remembers.

src/batch_size.py measures. Nothing here needs torch, so that what a run chose can be read before torch is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from src.errors import ExitCode, UserError
from src.files import write_json
from src.plain_values import check, limited, read_json
from src.text import printable

log = logging.getLogger(__name__)

FIRST = 2  # the size tried first; BatchNorm cannot always normalise a single image
HEADER = f"{'batch size':>10}{'peak MiB':>11}{'images/s':>11}"


class Measured(NamedTuple):
    """A training step of some size: what it holds without images, the most it held, and its speed."""

    fixed_mib: int
    peak_mib: int
    images_per_second: float


@dataclass(frozen=True)
class Trial:
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
) -> list[Trial]:
    """The sizes that were tried, each printed as soon as it is known: doubled until one does not fit, then bisected.

    measure: runs steps of a size; None where they run out of memory. largest: no size beyond it is tried. extrapolate:
    do not run a size that would need more than is allowed, on a line through what was measured: a CPU that runs out of
    memory swaps, or has its process killed. Above 8 the sizes are multiples of 8, found to about an eighth.
    """
    trials: list[Trial] = []
    measured: dict[int, Measured] = {}

    def attempt(size: int) -> Trial:
        if extrapolate and measured and (expected := _expected_peak(measured, size)) > allowed_mib:
            return Trial(size, expected, None, False, "not tried: the peak is an estimate, and too much")
        found = measure(size)
        if found is None:
            return Trial(size, None, None, False, "out of memory")
        measured[size] = found
        fits = found.peak_mib <= allowed_mib
        return Trial(size, found.peak_mib, found.images_per_second, fits, "fits" if fits else "too much")

    def fits(size: int) -> bool:
        trials.append(attempt(size))
        log.info(trials[-1].row())
        return trials[-1].fits

    log.info(HEADER)
    largest = _even(largest)
    low, high = 0, None  # the largest that fits, the smallest that does not
    while high is None and low < largest:
        size = min(2 * low or FIRST, largest)
        if fits(size):
            low = size
        else:
            high = size
    while high is not None and high - low > low // 8 and (middle := _even((low + high) // 2)) > low:
        if fits(middle):
            low = middle
        else:
            high = middle
    return trials


def _even(size: int) -> int:
    """Above 8 a multiple of 8, which is what tensor cores and vector units divide their work by."""
    return size if size <= 8 else size - size % 8


def _expected_peak(measured: dict[int, Measured], size: int) -> int:
    """Activations are a line over the batch size; what a step holds without images is where the line starts."""
    fixed = measured[min(measured)].fixed_mib  # the first reading: later ones hold what malloc kept of earlier trials
    known = max(measured)
    return fixed + (measured[known].peak_mib - fixed) * size // known


def largest_fitting(trials: Sequence[Trial]) -> Trial | None:
    return max((trial for trial in trials if trial.fits), key=lambda trial: trial.batch_size, default=None)


def smallest_as_fast(trials: Sequence[Trial]) -> int:
    """The smallest size within 5 % of the quickest; beyond it, larger batches save no time."""
    speeds = {trial.batch_size: trial.images_per_second for trial in trials if trial.fits}
    return min(size for size, speed in speeds.items() if speed >= 0.95 * max(speeds.values()))


def remember(folder: Path, batch_size: int, trials: Sequence[Trial]) -> None:
    """Writes batch_size.json into the run's folder. batch_size: over all devices."""
    write_json(folder / "batch_size.json", {"batch_size": batch_size, "tried": [asdict(trial) for trial in trials]})


def chosen_batch_size(folder: Path) -> int | None:
    """What data.batch_size=auto chose in the run of this folder, or None if nothing was chosen yet."""
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
