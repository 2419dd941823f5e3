"""The labels of task=multilabel and the values of task=regression in a report: how well each is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from src.engine.reports import plots
from src.engine.reports.answers import Answers
from src.engine.reports.classes import LONGEST_LIST
from src.engine.reports.files import number, read_table
from src.engine.reports.rendering import Cell

MOST_PLOTS, MOST_POINTS = 6, 2000  # of predicted values
COUNTED = ["", "images", "predicted", "precision", "recall", "F1"]


@dataclass(frozen=True)
class Labels:
    """rows: the numbers of each label; of many the LONGEST_LIST with the lowest F1. svg: of all, unless they are many."""

    header: list[str]
    rows: list[list[Cell]]
    svg: Markup | None
    caption: str


def labels_of_file(file: Path, result: dict[str, Any]) -> Labels | None:
    """Of a run's labels.csv."""
    if not file.exists():
        return None
    rows = [(name, [*map(number, cells)]) for name, *cells in read_table(file)[1]]
    split = "test" if any(name.startswith("test/") for name in result.get("metrics", {})) else "val"
    return _labels([*COUNTED, "AP", "threshold"], rows, f"Of the {split} images.", "; labels.csv has all.")


def labels_of_answers(answers: Answers, caption: str) -> Labels | None:
    """Counted from the answers; None for another task."""
    if answers.kind != "labels" or answers.true is None or answers.told is None:
        return None
    rows = []
    for name, true, told in zip(answers.names, answers.true.T, answers.told.T, strict=True):
        right, images, predicted = (int(flags.sum()) for flags in (true & told, true, told))
        shares = [right / predicted if predicted else math.nan, right / images if images else math.nan]
        rows.append((name, [images, predicted, *shares, 2 * right / (images + predicted) if images else math.nan]))
    return _labels(COUNTED, rows, caption, ".")


def _labels(header: list[str], rows: Sequence[tuple[str, list[float]]], caption: str, end: str) -> Labels:
    few = len(rows) <= plots.NUMBERED_CLASSES
    marks = {
        title: [numbers[column] for _, numbers in rows]
        for title, column in (("F1", 4), ("precision", 2), ("recall", 3))
    }
    svg = plots.to_svg(plots.dot_plot(marks, [name for name, _ in rows]), "F1 of the labels") if few else None
    worst = sorted(rows, key=lambda row: 2 if math.isnan(row[1][4]) else row[1][4])[:LONGEST_LIST]
    which = "" if few else f" The {LONGEST_LIST} of {len(rows):,} with the lowest F1{end}"
    shown: list[list[Cell]] = [
        [name, int(images), int(predicted), *rest] for name, (images, predicted, *rest) in (rows if few else worst)
    ]
    return Labels(header, shown, svg, f"{caption}{which}")


@dataclass(frozen=True)
class Values:
    """header, rows: a table with a row per name. svgs: predicted over true values, of the first names."""

    header: list[str]
    rows: list[list[Cell]]
    svgs: list[Markup]
    caption: str


def values_of_answers(answers: Answers) -> Values | None:
    """None for another task."""
    if answers.kind != "values" or answers.true is None or answers.told is None:
        return None
    columns = {}
    for place, name in enumerate(answers.names):
        columns |= {f"true_{name}": answers.true[:, place], f"predicted_{name}": answers.told[:, place]}
    return values(columns)


def values(columns: Mapping[str, Sequence[float] | np.ndarray]) -> Values | None:
    """columns: true_NAME and predicted_NAME of each name, a value per image."""
    if not columns:
        return None
    rows: list[list[Cell]] = []
    svgs = []
    for name in [column.removeprefix("true_") for column in columns if column.startswith("true_")]:
        true, predicted = np.array(columns[f"true_{name}"]), np.array(columns[f"predicted_{name}"])
        error = predicted - true
        rmse, spread = float(np.sqrt((error**2).mean())), float(true.std())
        r2 = 1 - (rmse / spread) ** 2 if spread > 0 else math.nan
        rows.append([name, r2, float(abs(error).mean()), rmse, spread])
        if len(svgs) < MOST_PLOTS:
            some = np.linspace(0, len(true) - 1, min(len(true), MOST_POINTS)).astype(int)
            plot = plots.scatter_plot(true[some], predicted[some], name)
            svgs.append(plots.to_svg(plot, f"predicted and true values {len(svgs) + 1}: {name}"))
    images = len(next(iter(columns.values())))
    shown = f"{MOST_POINTS:,} of {images:,}" if images > MOST_POINTS else f"{images:,}"
    header = ["", "R2", "MAE", "RMSE", "RMSE of the mean"]
    return Values(header, rows, svgs, f"{shown} images. On the dotted line a prediction is right.")
