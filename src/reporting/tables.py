"""The table at the end of a run or an evaluation, and the next command to try."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.run_dir import write_csv

log = logging.getLogger(__name__)

COLUMNS = {"acc": "accuracy", "balanced_acc": "balanced", "macro_f1": "macro F1", "loss": "loss"}


def metrics_table(metrics: Mapping[str, float]) -> str:
    """{"test/acc": 0.98, ...} as a table: one line per split, one column per metric."""
    splits = list(dict.fromkeys(name.partition("/")[0] for name in metrics))
    lines = [f"{'':8}" + "".join(f"{title:>10}" for title in COLUMNS.values())]
    lines += [f"{split:8}" + "".join(f"{metrics[f'{split}/{name}']:>10.4f}" for name in COLUMNS) for split in splits]
    return "\n".join(lines)


def print_result(path: Path, result: Mapping[str, Any]) -> None:
    """The end of a run: its numbers, where the files are, what to do next."""
    log.info("")
    log.info(metrics_table(result["metrics"]))
    best = f"epoch {result['best_epoch']}"
    weights = f", weights of {result['weights']}" if result["weights"] != best else ""
    log.info(f"best {best} of {result['epochs']}{weights}, {result['steps']} steps, {result['wall_seconds']:.1f} s")
    log.info("")
    log.info(f"look at   {path}/report.html")
    log.info(f"files     {path}/: result.json, metrics.csv, confusion.csv, memory.csv, train.log, checkpoints/, model/")
    log.info(f"next      python -m src.predict run={path} images=FOLDER_OR_FILE")
    log.info(f"          python -m src.evaluate run={path}")


def write_confusion(path: Path, classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> None:
    """A CSV with one row per true class and one column per predicted class."""
    write_csv(path, ["true \\ predicted", *classes], [[name, *row] for name, row in zip(classes, matrix, strict=True)])
