"""What a run answered on its held-out images, from predictions.csv: its mistakes, and how right its probabilities are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from pathlib import Path

import numpy as np
from markupsafe import Markup

from src.engine.reports import plots
from src.engine.reports.files import read_table
from src.engine.runs.intervals import share_interval

SHOWN = 12  # mistakes, and images of which the network was unsure
MOST_FLAGS = 10**7  # images * classes
BINS = 10  # of the probability, of the reliability diagram


@dataclass(frozen=True)
class Answer:
    """Of an image; of several labels or values, of one of them."""

    path: str
    name: str  # the class that was told, or the label or value that it is about
    true: str
    told: str
    share: float  # the probability of what was told; of values: the error in standard deviations of the true values
    margin: float  # how far it is before the next answer

    @property
    def is_wrong(self) -> bool:
        return self.told != self.true


@dataclass(frozen=True)
class Answers:
    """kind: classes, labels or values. Of the test images, or of val in a run without test; of folds, of all images."""

    kind: str
    names: list[str]  # of the classes, labels or values
    answers: list[Answer]
    true: np.ndarray | None  # (images, names): 0 and 1, or values; None: they would be too many
    told: np.ndarray | None

    def mistakes(self) -> list[Answer]:
        """The most confident first."""
        return nlargest(SHOWN, (answer for answer in self.answers if answer.is_wrong), key=lambda answer: answer.share)

    def unsure(self) -> list[Answer]:
        return [] if self.kind == "values" else nsmallest(SHOWN, self.answers, key=lambda answer: answer.margin)


def read_answers(path: Path) -> Answers | None:
    """None without the file, and for a task of the owner's, whose columns may be any."""
    header, rows = read_table(path)
    if header[-1:] == ["group"]:  # of each image; nothing here asks for it
        header, rows = header[:-1], [row[:-1] for row in rows]
    if header[1:2] == ["fold"]:
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    names = [name.removeprefix("probability_") for name in header[3:]]
    if header[1:3] == ["true", "predicted"]:
        return Answers("classes", names, [_of_class(names, row) for row in rows], *_one_hot(rows))
    if header[1:3] == ["true", "labels"]:
        answers = [answer for row in rows for answer in _of_labels(names, row)]
        flags = [np.array([[name in labels_in(row[at]) for name in names] for row in rows]) for at in (1, 2)]
        return Answers("labels", names, answers, *flags)
    if rows and header[1].startswith("true_"):
        numbers = np.array([[float(cell) for cell in row[1:]] for row in rows])
        true, told = numbers[:, 0::3], numbers[:, 1::3]  # and the error
        names = [name.removeprefix("true_") for name in header[1::3]]
        return Answers("values", names, _of_values(names, rows, true, told), true, told)
    return None


def labels_in(text: str) -> set[str]:
    return {label.strip() for label in text.split(";")}


def _one_hot(rows: Sequence[Sequence[str]]) -> list[np.ndarray | None]:
    """The true and the told class, of the classes that occur among the labels."""
    names = sorted({row[1] for row in rows})
    if len(names) * len(rows) > MOST_FLAGS:
        return [None, None]
    return [np.array([[row[at]] for row in rows]) == np.array(names) for at in (1, 2)]


def _of_class(names: Sequence[str], row: Sequence[str]) -> Answer:
    path, true, told, *cells = row
    shares = dict(zip(names, map(float, cells), strict=True))
    nearest = max((share for name, share in shares.items() if name != told), default=0.0)
    return Answer(path, told, true, told, shares[told], shares[told] - nearest)


def _of_labels(names: Sequence[str], row: Sequence[str]) -> list[Answer]:
    path, true, told, *shares = row
    has, says = labels_in(true), labels_in(told)
    answers = []
    for name, share in zip(names, map(float, shares), strict=True):
        label, answer = (name if name in own else f"not {name}" for own in (has, says))
        answers.append(Answer(path, name, label, answer, share if name in says else 1 - share, abs(2 * share - 1)))
    return answers


def _of_values(names: Sequence[str], rows: Sequence[Sequence[str]], true: np.ndarray, told: np.ndarray) -> list[Answer]:
    errors = abs(told - true) / np.maximum(true.std(axis=0), 1e-12)
    answers = []
    for at, row in enumerate(rows):
        for place, name in enumerate(names):
            label, answer = (f"{name} {values[at, place]:.5g}" for values in (true, told))
            answers.append(Answer(row[0], name, label, answer, float(errors[at, place]), 0.0))
    return answers


@dataclass(frozen=True)
class Calibration:
    svg: Markup
    summary: str


def calibration(answers: Answers) -> Calibration | None:
    """How often answers of a probability are right: Guo et al. 2017, On Calibration of Modern Neural Networks."""
    if answers.kind == "values" or not answers.answers:
        return None
    shares = np.array([answer.share for answer in answers.answers])
    right = np.array([not answer.is_wrong for answer in answers.answers])
    bins = np.minimum((shares * BINS).astype(int), BINS - 1)
    points, error = [], 0.0
    for place in np.unique(bins):
        own = bins == place
        said, true = float(shares[own].mean()), float(right[own].mean())
        error += own.mean() * abs(said - true)
        points.append((said, true, *share_interval(true, int(own.sum()))))
    gap = float(shares.mean() - right.mean())
    low, high = share_interval(float(right.mean()), len(right))
    verdict = "the difference is no more than noise"
    if not low <= shares.mean() <= high:
        verdict = f"on average they are {abs(gap):.3f} too {'high' if gap > 0 else 'low'}"
    return Calibration(
        plots.to_svg(plots.reliability_plot(points), "reliability of the probabilities"),
        f"Expected calibration error (ECE, {BINS} bins): {error:.3f}. {right.mean():.3f} of the answers are right, "
        f"and their mean probability is {shares.mean():.3f}: {verdict}.",
    )
