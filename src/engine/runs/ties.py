"""What val cannot tell apart: epochs of a run, trials of a sweep, whose metric is within a standard error of the best one's.

The one-standard-error rule (L. Breiman and others, 1984, Classification and Regression Trees, 3.4.3): of two independent
numbers that differ by one standard error, the better one would be the better one again three times in four.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from src.engine.commands.schema import METRICS, Config
from src.engine.runs.files import read_metrics
from src.engine.runs.intervals import Z
from src.engine.runs.text import decimal


def standard_error(interval: Sequence[float] | None) -> float | None:
    """Of the metric with this 95 % interval; None where it has none."""
    return None if interval is None else (interval[1] - interval[0]) / (2 * Z)


def tied(values: Mapping[int, float], error: float, more_is_better: bool) -> list[int]:
    """The keys whose values are within the error of the best one, which is among them."""
    values = {key: value for key, value in values.items() if math.isfinite(value)}
    if not values:
        return []
    best = max(values.values()) if more_is_better else min(values.values())
    return [key for key, value in values.items() if abs(best - value) <= error]


def tied_epochs(
    run: Path, config: Config, intervals: Mapping[str, Sequence[float]], splits: Mapping[str, Sequence[int]]
) -> dict[str, Any] | None:
    """For result.json: the epochs, counted from 1, that val cannot tell from the best one, with the standard error of the
    monitored metric; None where there is no other, where the metric has no interval, or where epochs were measured on a part
    of val (trainer.limit_batches). splits: the images of each."""
    monitor = config.checkpoint.monitor
    error = standard_error(intervals.get(monitor))
    if error is None or config.trainer.limit_batches or not (run / "metrics.csv").is_file():
        return None
    rows = [row for row in read_metrics(run / "metrics.csv") if {monitor, "epoch"} <= row.keys()]
    epochs = tied({int(row["epoch"]): row[monitor] for row in rows}, error, METRICS.get(monitor) != "min")
    if len(epochs) < 2:
        return None
    return {"epochs": epochs, "of": len(rows), "standard_error": error, "images": len(splits["val"])}


def ties_text(ties: Mapping[str, Any] | None) -> str | None:
    """'cannot tell epochs 5 to 12 apart (269 images: ±0.010)'. ties: as in result.json, of a run that has them."""
    if not ties:
        return None
    epochs = sorted(ties["epochs"])
    follow = all(after == epoch + 1 for epoch, after in pairwise(epochs))
    which = f"epochs {epochs[0]} to {epochs[-1]}" if follow else f"{len(epochs)} of {ties['of']} epochs"
    return f"cannot tell {which} apart ({ties['images']:,} images: ±{error_text(ties['standard_error'])})"


def error_text(error: float) -> str:
    return f"{error:.3f}" if 0.0005 <= error < 10 else decimal(error)
