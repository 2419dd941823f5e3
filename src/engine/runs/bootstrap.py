"""How sure the metrics of a split are: the 95 % interval of each, by drawing images again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from src.engine.own import is_own
from src.engine.runs import seeding
from src.engine.runs.intervals import PROPORTIONS, share_interval
from src.engine.runs.outputs import Outputs
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.own_metrics import Asking

RESAMPLES, MOST_VALUES = 200, 10**8  # and how many labels and logits all of them may have together
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
    drawn: list[dict[str, float]] = []
    for resample in range(RESAMPLES):
        chosen = torch.randint(number, (number,), generator=seeding.generator(seed, "bootstrap", resample))
        asking.metric.reset()
        asking.metric.update(**{name: value[chosen] for name, value in given.items()})
        drawn.append(asking.compute(""))
    for name in drawn[0].keys() - sure.keys():
        numbers = np.array([each[name] for each in drawn])
        if not np.isfinite(numbers).any():  # val has too few images for it
            continue
        low, high = np.nanpercentile(numbers, [2.5, 97.5]).tolist()
        if name in MEANS:
            least = share_interval(values[name], number)
            low, high = min(low, least[0]), max(high, least[1])
        if low < high:
            sure[name] = low, high
    return sure
