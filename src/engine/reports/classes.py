"""The classes in a report: how many images each has, how well it is recognised, and what it is taken for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from src.engine.reports import plots
from src.engine.reports.answers import Answers, labels_in
from src.engine.reports.files import Row, read_table
from src.engine.reports.rendering import Cell
from src.engine.runs.intervals import share_interval
from src.engine.runs.tables import MATRIX_CLASSES, PAIRS

LONGEST_LIST = 10  # of many classes: confusions, and classes with the lowest recall or the fewest images
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Folded:
    """The rows of a table: all of a few classes; of many the first, and the others to be unfolded, unless they are too many
    for a page."""

    first: list[Any]
    rest: list[Any]
    total: int

    @classmethod
    def of(cls, rows: list[Any]) -> Folded:
        if len(rows) <= plots.NUMBERED_CLASSES:
            return cls(rows, [], len(rows))
        return cls(rows[:LONGEST_LIST], rows[LONGEST_LIST:] if len(rows) <= MATRIX_CLASSES else [], len(rows))


@dataclass(frozen=True)
class Counts:
    """rows: name and images of each split, and the share of the largest class's training images in percent, for a bar.
    training: class -> training images."""

    header: list[str]
    rows: Folded
    summary: str
    training: Mapping[str, int]


def count(rows: Sequence[Row], task: str) -> Counts | None:
    """Images per class, or per label, and split; the rarest first where there are many. None of numbers."""
    if not rows or task == "regression":
        return None
    texts = {row["label"] for row in rows}
    names = {text: sorted(labels_in(text)) if task == "multilabel" else [text] for text in texts}
    sizes = {
        split: Counter(name for row in rows if row["split"] == split for name in names[row["label"]])
        for split in SPLITS
    }
    classes = sorted({name for own in names.values() for name in own if name})
    splits = [split for split in SPLITS if sizes[split]]
    train = {name: sizes["train"][name] for name in classes}
    if not train:
        return None
    largest, rarest = max(train, key=lambda name: train[name]), min(train, key=lambda name: train[name])
    order = classes if len(classes) <= plots.NUMBERED_CLASSES else sorted(classes, key=lambda name: train[name])
    lines: list[tuple[list[Cell], float]] = [
        ([name, *(sizes[split][name] for split in splits)], 100 * train[name] / max(1, train[largest]))
        for name in order
    ]
    summary = "All have about as many training images."
    if train[largest] > 1.5 * train[rarest]:
        times = f", {train[largest] / train[rarest]:.1f} times as many" if train[rarest] else ""
        summary = f"Fewest training images: {rarest} ({train[rarest]:,}). Most: {largest} ({train[largest]:,}{times})."
    return Counts(["", *splits], Folded.of(lines), summary, train)


@dataclass(frozen=True)
class Confusion:
    """svg: the matrix, unless confusion.csv holds only pairs. worst: true class, predicted class, images, of. recall: a row per
    class: name, images, recall, its interval, precision."""

    summary: str
    svg: Markup | None
    worst: list[tuple[Cell, ...]]
    recall: Folded


def confusion(file: Path, result: dict[str, Any]) -> Confusion | None:
    """Of a run's confusion.csv."""
    if not file.exists():
        return None
    (first, *classes), rows = read_table(file)
    split = "test" if "test/acc" in result.get("metrics", {}) else "val"
    if first == PAIRS[0]:  # of many classes the file holds only the pairs that occurred
        return _confusion([(true, predicted, int(number)) for true, predicted, number in rows], None, f"{split} images")
    matrix = np.array([row[1:] for row in rows], dtype=np.int64)
    pairs = [(classes[true], classes[column], int(matrix[true, column])) for true, column in np.argwhere(matrix)]
    return _confusion(pairs, classes, f"{split} images")


def confusion_of(answers: Answers, images: str) -> Confusion | None:
    """Counted from the answers; None for another task. images: what they are called, with a noun."""
    if answers.kind != "classes":
        return None
    counts = Counter((answer.true, answer.told) for answer in answers.answers)
    classes = answers.names if len(answers.names) <= MATRIX_CLASSES else None
    return _confusion([(*pair, counts[pair]) for pair in sorted(counts)], classes, images)


def _confusion(pairs: Sequence[tuple[str, str, int]], classes: Sequence[str] | None, images: str) -> Confusion:
    """classes: of the matrix, which is left out without them. images: 'test images'."""
    svg = None
    if classes is not None:
        place = {name: number for number, name in enumerate(classes)}
        matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
        for true, predicted, number in pairs:
            matrix[place[true], place[predicted]] = number
        svg = plots.to_svg(plots.heat_map(matrix, classes, "predicted class", "true class"), "confusion matrix")
    of_class: Counter[str] = Counter()
    for true, _, number in pairs:
        of_class[true] += number
    mistakes = sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: -pair[2])
    wrong = sum(pair[2] for pair in mistakes)
    is_readable = classes is not None and len(classes) <= plots.NUMBERED_CLASSES
    recall = _recall(pairs, of_class)
    if len(recall) > plots.NUMBERED_CLASSES:
        recall.sort(key=lambda row: row[2])
    return Confusion(
        f"{wrong:,} of {of_class.total():,} {images} were taken for another class.",
        svg,
        [] if is_readable else [(*pair, of_class[pair[0]]) for pair in mistakes[:LONGEST_LIST]],
        Folded.of(recall),
    )


def _recall(pairs: Sequence[tuple[str, str, int]], of_class: Mapping[str, int]) -> list[list[Any]]:
    predicted: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for true, told, number in pairs:
        predicted[told] += number
        right[true] += number if true == told else 0
    rows = []
    for name, images in of_class.items():
        low, high = share_interval(right[name] / images, images)
        precision = right[name] / predicted[name] if predicted[name] else float("nan")
        rows.append([name, images, right[name] / images, f"{low:.2f} to {high:.2f}", precision])
    return rows
