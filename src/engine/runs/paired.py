"""Two models on the same images: by how much the first is better, and whether chance alone would do that.

If neither model is better, it is as likely that an image's two answers are the other way round (R. A. Fisher, 1935, The Design
of Experiments, 21). So chance is what comes of exchanging the models' answers at random, image by image, or group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import bdtr
from torch import Tensor

from src.engine.commands.schema import METRICS
from src.engine.own import is_own
from src.engine.runs import seeding
from src.engine.runs.bootstrap import MOST_VALUES, asked, resampled
from src.engine.runs.intervals import PROPORTIONS
from src.engine.runs.outputs import Outputs
from src.engine.runs.text import decimal, plural
from src.engine.steps.task_kind import TaskKind

LEVEL = 0.05  # a difference that chance makes less often is larger than chance
EXCHANGES = 2000  # of differences of images
MEASURED = 400  # of a metric, which is measured twice for each
TIE = 1e-12  # relative: sums of the same numbers in another order

Answered = tuple[TaskKind, Outputs]  # with the thresholds that were chosen for the model


@dataclass(frozen=True)
class Gain:
    """value: by how much the metric is better, negative where it is worse. is_sure: whether that is more than chance; None: it
    is not known. how: for people, 'p = 0.01, McNemar's exact test', or why it is not known."""

    value: float
    is_sure: bool | None
    how: str = ""

    def said(self) -> str:
        """'training gained 0.0500, more than chance (p = 0.01, ...)'"""
        if self.value == 0:
            return "training reached the same"
        number = f"training {'gained' if self.value > 0 else 'lost'} {decimal(abs(self.value))}"
        if self.is_sure is None:
            return f"{number}; it is not known whether by chance" + (f": {self.how}" if self.how else "")
        return f"{number}, {'more than chance' if self.is_sure else 'which may be chance'} ({self.how})"


def compared_images(gains: np.ndarray, groups: Sequence[str] | None) -> tuple[float, str]:
    """p, and the name of the test, for the mean of a difference on each image. groups: of the images, which belong together;
    None: each stands for itself.

    Where the differences are 1, 0 and -1, the exchanges need not be drawn: Q. McNemar, 1947, Psychometrika 12, p. 153.
    """
    if groups is None and set(np.unique(gains)) <= {-1.0, 0.0, 1.0}:
        wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
        return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5))), "McNemar's exact test"
    sums = gains
    if groups is not None:
        _, place = np.unique(groups, return_inverse=True)
        sums = np.bincount(place, gains)
    random = np.random.default_rng(seeding.key(0, "exchange"))
    signs = random.integers(2, size=(EXCHANGES, len(sums)), dtype=np.int8) * 2.0 - 1
    return _p(sums.sum(), signs @ sums), _named(len(sums), groups)


def metric_gain(
    name: str,
    values: tuple[float, float],
    classes: Sequence[str],
    models: tuple[Answered, Answered],
    seed: int,
    groups: Sequence[str] | None,
) -> Gain:
    """Of a metric with these values. groups: of the images, which belong together; None: each stands for itself."""
    value = (values[0] - values[1]) * (-1 if METRICS.get(f"val/{name}") == "min" else 1)
    if models[0][1].members != models[1][1].members:
        return Gain(value, None, "some images could no longer be read")
    if name in PROPORTIONS:
        own, other = (_right(*model).double().numpy() for model in models)
        p, test = compared_images(own - other, groups)
    else:
        differences = _exchanged(name, classes, models, seed, groups)
        if differences is None:
            return Gain(value, None)
        p, test = _p(value, differences), _named(len(models[0][1].members), groups)
    return Gain(value, p < LEVEL, f"p = {p:.2g}, {test}")


def _p(difference: float, by_chance: np.ndarray) -> float:
    """How often chance makes as large a difference, this one included."""
    reached = np.abs(by_chance) >= abs(difference) * (1 - TIE)
    return float((1 + reached.sum()) / (1 + len(by_chance)))


def _named(images: int, groups: Sequence[str] | None) -> str:
    drawn = plural(images, "image") if groups is None else plural(len({*groups}), "group")
    return f"randomisation test of {drawn}"


def _right(kind: TaskKind, outputs: Outputs) -> Tensor:
    """Whether all of an image's labels are, (N,)."""
    same = kind.predicted(outputs.logits) == outputs.labels
    return same if same.ndim == 1 else same.all(1)


def _exchanged(
    name: str, classes: Sequence[str], models: tuple[Answered, Answered], seed: int, groups: Sequence[str] | None
) -> np.ndarray | None:
    """The metric's difference after each exchange. None of an owner's metric, and where there are so many images that it would
    take minutes."""
    if is_own(models[0][0].name):
        return None
    (asking, one), (_, other) = (asked(kind, classes, outputs) for kind, outputs in models)
    if MEASURED * sum(value.numel() for value in one.values()) > MOST_VALUES:
        return None
    given = {key: torch.cat([one[key], other[key]]) for key in one}
    swaps = _Swaps(len(models[0][1].members), seed, groups)
    numbers = resampled(asking, given, swaps, 2 * MEASURED).get(name)
    return None if numbers is None else np.nan_to_num(numbers[::2] - numbers[1::2], nan=np.inf)


class _Swaps:
    """Draws from the answers of one model with those of the other behind them. Every second draw has the answers that the one
    before it left."""

    def __init__(self, images: int, seed: int, groups: Sequence[str] | None) -> None:
        self.images_of_one, self.seed = images, seed
        self.number = 2 * images
        places = range(images) if groups is None else np.unique(groups, return_inverse=True)[1]
        self.group_of = torch.as_tensor(np.asarray(places))

    def images(self, draw: int) -> Tensor:
        generator = seeding.generator(self.seed, "exchange", draw // 2)
        swapped = torch.randint(2, (int(self.group_of.max()) + 1,), generator=generator)[self.group_of]
        if draw % 2:
            swapped = 1 - swapped
        return torch.arange(self.images_of_one) + self.images_of_one * swapped
