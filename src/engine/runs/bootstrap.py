"""How sure the metrics of a split are: the 95 % interval of each, by drawing images again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.engine.own import is_own
from src.engine.runs import seeding
from src.engine.runs.intervals import PROPORTIONS, share_interval
from src.engine.runs.outputs import Outputs
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.label_metrics import LabelMetrics
from src.engine.steps.own_metrics import Asking

RESAMPLES, MOST_VALUES = 200, 10**8  # and how many labels and logits all of them may have together
AT_ONCE = 2 * 10**6  # images of all resamples that are counted at once: 16 MB of float64
MEANS = ("balanced_acc", "macro_f1")  # over the classes


def metric_intervals(
    model: TrainedModel, outputs: Outputs, values: Mapping[str, float], seed: int
) -> dict[str, tuple[float, float]]:
    """Name -> 95 % interval, of a built-in task's metrics but the loss: of shares Wilson's, of the others the percentiles of a
    bootstrap over the images (B. Efron, 1979, Annals of Statistics 7, p. 1). Of very many images the others have none: it would
    take minutes to say that they are sure.

    Where all images are right, a bootstrap finds no doubt; so means over classes are at least as unsure as an accuracy.
    """
    kind, number = model.kind, len(outputs.labels)
    sure = {name: share_interval(values[name], number) for name in PROPORTIONS if name in values}
    if is_own(kind.name):
        return sure
    asking = Asking(kind.metrics(model.card.classes, "test"), f"task={kind.name}")
    given = asking.given(outputs.logits, outputs.labels, kind)
    if RESAMPLES * sum(value.numel() for value in given.values()) > MOST_VALUES:
        return sure
    resampled = _resampled(asking, given, number, seed)
    for name, numbers in resampled.items():
        if name in sure:
            continue
        if not np.isfinite(numbers).any():  # val has too few images for it
            continue
        low, high = np.nanpercentile(numbers, [2.5, 97.5]).tolist()
        if name in MEANS:
            least = share_interval(values[name], number)
            low, high = min(low, least[0]), max(high, least[1])
        if low < high:
            sure[name] = low, high
    return sure


def _resampled(asking: Asking, given: Mapping[str, Tensor], number: int, seed: int) -> dict[str, np.ndarray]:
    """Name -> the metric in each resample. given: what the metric's update takes of all images."""
    rows: list[dict[str, Any]] = []
    if isinstance(asking.metric, LabelMetrics):  # to rank all images again for each resample takes seconds
        at_once = max(1, AT_ONCE // number)
        for start in range(0, RESAMPLES, at_once):
            part = [_draw(number, seed, resample) for resample in range(start, min(start + at_once, RESAMPLES))]
            drawn = torch.stack([chosen.bincount(minlength=number) for chosen in part]).double()
            rows.append({name: each.numpy() for name, each in asking.metric.resampled(**given, drawn=drawn).items()})
    else:
        for resample in range(RESAMPLES):
            chosen = _draw(number, seed, resample)
            asking.metric.reset()
            asking.metric.update(**{name: value[chosen] for name, value in given.items()})
            rows.append({name: np.array([value]) for name, value in asking.compute("").items()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _draw(number: int, seed: int, resample: int) -> Tensor:
    """The indices of the images that a resample has."""
    return torch.randint(number, (number,), generator=seeding.generator(seed, "bootstrap", resample))
