"""How sure a number is: the 95 % interval of a share of images, such as an accuracy, and of every other metric."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from src.engine.own import is_own
from src.engine.runs import seeding
from src.engine.runs.outputs import Outputs
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.own_metrics import Asking

RESAMPLES, MOST_VALUES = 200, 10**8  # of the bootstrap, and how many labels and logits all of them may have together
Z = 1.96  # standard deviations on both sides that hold 95 % of a normal distribution
MEANS = ("balanced_acc", "macro_f1")  # over the classes
PROPORTIONS = ("acc", "subset_acc")  # metrics that are shares of the images


def share_interval(share: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a share that was measured on so many images: E. B. Wilson, 1927, Journal of the American
    Statistical Association 22, p. 209. It is right for few images and for shares near 0 and 1 too."""
    if images == 0:
        return 0.0, 1.0
    scale = 1 + Z**2 / images
    centre = (share + Z**2 / (2 * images)) / scale
    half = Z * math.sqrt(share * (1 - share) / images + Z**2 / (4 * images**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def differ(one: float, other: float, images: int) -> bool:
    """Whether two shares of so many images differ by more than chance, as of two independent sets: a cautious answer, since
    both were measured on the same images."""
    mean = (one + other) / 2
    error = math.sqrt(2 * mean * (1 - mean) / max(1, images))
    return abs(one - other) > Z * error


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
