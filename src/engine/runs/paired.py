"""Two models on the same images: by how much the first is better, and whether chance alone would do that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr
from torch import Tensor

from src.engine.commands.schema import METRICS
from src.engine.runs.bootstrap import Draw, resampled
from src.engine.runs.intervals import PROPORTIONS
from src.engine.runs.outputs import Outputs
from src.engine.steps.task_kind import TaskKind

LEVEL = 0.05  # a difference that chance makes less often is larger than chance
FEWEST_GROUPS = 6  # if all of 5 are for one model, that is chance in 6 of 100 times

Answered = tuple[TaskKind, Outputs]  # with the thresholds that were chosen for the model


@dataclass(frozen=True)
class Gain:
    """value: by how much the metric is better, negative where it is worse. is_sure: whether that is more than chance; None: it
    is not known. how: for people, 'p = 0.01, McNemar's exact test'."""

    value: float
    is_sure: bool | None
    how: str = ""


def mcnemar(wins: int, losses: int) -> float:
    """The probability that so many images, or more, are right by one of two equal models alone: Q. McNemar, 1947,
    Psychometrika 12, p. 153, by the exact binomial distribution."""
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def metric_gain(
    name: str,
    values: tuple[float, float],
    classes: Sequence[str],
    models: tuple[Answered, Answered],
    seed: int,
    groups: Sequence[str] | None,
) -> Gain:
    """Of a metric with these values. groups: of the images, which are drawn together; None: each stands for itself."""
    sign = -1 if METRICS.get(f"val/{name}") == "min" else 1
    (kind, ours), (other_kind, theirs) = models
    value = sign * (values[0] - values[1])
    if ours.members != theirs.members:
        return Gain(value, None, "other images were measured")
    if name in PROPORTIONS and groups is None:
        own, other = _right(kind, ours), _right(other_kind, theirs)
        p = mcnemar(int((own & ~other).sum()), int((other & ~own).sum()))
        return Gain(value, p < LEVEL, f"p = {p:.2g}, McNemar's exact test")
    draw = Draw(len(ours.members), seed, groups)
    one, two = (resampled(of, classes, outputs, draw).get(name) for of, outputs in models)
    if one is None or two is None:
        return Gain(value, None)
    low, high = np.nanquantile(sign * (one - two), [LEVEL / 2, 1 - LEVEL / 2]).tolist()
    by = "" if groups is None else f" by {draw.units} groups"
    sure = (low > 0 or high < 0) and (groups is None or draw.units >= FEWEST_GROUPS)
    return Gain(value, sure, f"{low:.3g} to {high:.3g}, {100 * (1 - LEVEL):.3g} % interval{by}")


def _right(kind: TaskKind, outputs: Outputs) -> Tensor:
    """Whether all of an image's labels are, (N,)."""
    same = kind.predicted(outputs.logits) == outputs.labels
    return same if same.ndim == 1 else same.all(1)
