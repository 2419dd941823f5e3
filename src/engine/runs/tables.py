"""The end of a run or an evaluation on the screen: the table of metrics and the next command; and confusion.csv."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.engine.runs.files import write_csv
from src.engine.runs.text import decimal, printable, shell_word
from src.engine.runs.ties import ties_text

log = logging.getLogger(__name__)

COLUMNS = {  # of the built-in tasks
    "acc": "accuracy", "balanced_acc": "balanced", "macro_f1": "macro F1", "map": "mean AP", "subset_acc": "all labels",
    "r2": "R2", "mae": "MAE", "rmse": "RMSE", "loss": "loss",
}  # fmt: skip
MATRIX_CLASSES = 1000  # up to here confusion.csv is a matrix
PAIRS = ("true", "predicted", "count")  # its columns for more classes
# The files of a run to look at, in this order; not every run has all of them.
FILES = (
    "result.json", "metrics.csv", "confusion.csv", "labels.csv", "values.csv", "predictions.csv", "doubts.csv", "memory.csv",
    "train.log", "checkpoints", "model",
)  # fmt: skip


def column_titles(metrics: Iterable[str]) -> dict[str, str]:
    """Name -> title of the metrics to show: the task's, then the owner's. metrics: names such as val/acc."""
    names = {name.partition("/")[2] for name in metrics}
    return {name: COLUMNS[name] for name in COLUMNS if name in names} | {
        name: name for name in sorted(names) if name not in COLUMNS
    }


def main_metric(metrics: Iterable[str]) -> list[str]:
    """The name of the metric that is shown beside the loss, such as acc; none of a task that has only the loss."""
    return [name for name in column_titles(metrics) if name != "loss"][:1]


BASELINE = "the baseline"  # what result.json calls the weights of a run that ends with it


def compared_metric(monitor: str, metrics: Iterable[str]) -> str:
    """The monitored metric, such as acc; in the place of the loss, which says little, the task's first."""
    name = monitor.partition("/")[2]
    return name if name not in ("", "loss") else next(iter(main_metric(metrics)), "loss")


def metrics_table(
    metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]] | None = None, by: str | None = None
) -> str:
    """{"test/acc": 0.98, ...} as a table: one column per metric, empty where an older run lacks one; for each split a line, and
    below it the 95 % intervals, where there are any. by: group, where these are of resampled groups."""
    splits = list(dict.fromkeys(name.partition("/")[0] for name in metrics))
    columns, intervals = column_titles(metrics), intervals or {}
    rows = [("", *columns.values())]
    for split in splits:
        cells = [metrics.get(f"{split}/{name}") for name in columns]
        rows.append((split, *("" if cell is None else decimal(cell) for cell in cells)))
        sure = [intervals.get(f"{split}/{name}") for name in columns]
        if any(sure):
            cells = ["" if between is None else interval_text(*between) for between in sure]
            rows.append((f"  95 % by {by}" if by else "  95 %", *cells))
    widths = [max(8, *(len(cell) for cell in cells)) + 2 for cells in zip(*rows, strict=True)]
    lines = [split.ljust(max(8, widths[0] - 2)) + "".join(map(str.rjust, cells, widths[1:])) for split, *cells in rows]
    return "\n".join(line.rstrip() for line in lines)


def interval_text(low: float, high: float) -> str:
    """'0.93 to 0.97': with as many digits as its width needs."""
    width = high - low
    digits = max(2 if width < 2 else 0, 1 - math.floor(math.log10(width))) if width > 0 else 4
    low, high = (round(end, digits) + 0.0 for end in (low, high))  # + 0.0: no -0.00
    return f"{low:.{digits}f} to {high:.{digits}f}"


def print_result(path: Path, result: Mapping[str, Any]) -> None:
    """Prints a run's numbers, its files and the next commands."""
    log.info("")
    log.info(metrics_table(result["metrics"], result.get("intervals"), result.get("intervals_by")))
    best = f"epoch {result['best_epoch']}"
    weights = f", weights of {result['weights']}" if result["weights"] != best else ""
    if result["epochs"]:
        setting = result.get("ended_by", "trainer.max_epochs")
        early = f", ended by {setting}" if setting not in (None, "trainer.max_epochs") else ""
        steps = f"{result['steps']} steps, {result['wall_seconds']:.1f} s"
        log.info(f"best {best} of {result['epochs']}{weights}{early}, {steps}")
        if text := ties_text(result.get("val_ties")):
            log.info(f"val       {text}")
    else:
        log.info(f"weights of {result['weights']}, no training, {result['wall_seconds']:.1f} s")
    if result["epochs"] and (verdict := (result.get("baseline") or {}).get("verdict")):
        log.info(f"baseline  {verdict}")
    log.info("")
    shown, run = printable(path), shell_word(path)
    if (path / "report.html").exists():
        log.info(f"look at   {shown}/report.html")
    files = [f"{name}/" if (path / name).is_dir() else name for name in FILES if (path / name).exists()]
    log.info(f"files     {shown}/: {', '.join(files)}")
    log.info(f"next      python -m src.predict run={run} images=FOLDER_OR_FILE")
    log.info(f"          python -m src.evaluate run={run}")


def write_confusion(path: Path, classes: Sequence[str], pairs: Iterable[Sequence[int]]) -> None:
    """A CSV with one row per true class and one column per predicted class. With more than MATRIX_CLASSES classes, one row
    per pair that occurred, instead of millions of zeros. pairs: true class, predicted class, number of images."""
    if len(classes) > MATRIX_CLASSES:
        write_csv(path, PAIRS, [[classes[true], classes[predicted], count] for true, predicted, count in pairs])
        return
    matrix = [[0] * len(classes) for _ in classes]
    for true, predicted, count in pairs:
        matrix[true][predicted] = count
    write_csv(path, ["true \\ predicted", *classes], [[name, *row] for name, row in zip(classes, matrix, strict=True)])
