"""How sure the metrics of a split are: the 95 % interval of each, by drawing images again, or groups of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from src.engine.own import is_own
from src.engine.runs import seeding
from src.engine.runs.intervals import PROPORTIONS, share_interval
from src.engine.runs.outputs import Outputs
from src.engine.steps.label_metrics import LabelMetrics
from src.engine.steps.own_metrics import Asking
from src.engine.steps.task_kind import TaskKind

RESAMPLES, MOST_VALUES = 200, 10**8  # and how many labels and logits all of them may have together
AT_ONCE = 2 * 10**6  # images of all resamples that are counted at once: 16 MB of float64
MEANS = ("balanced_acc", "macro_f1")  # over the classes


def metric_intervals(
    kind: TaskKind,
    classes: Sequence[str],
    outputs: Outputs,
    values: Mapping[str, float],
    seed: int,
    groups: Sequence[str] | None = None,
) -> dict[str, tuple[float, float]]:
    """Name -> 95 % interval, of a built-in task's metrics but the loss: of shares Wilson's, of the others the percentiles of a
    bootstrap over the images (B. Efron, 1979, Annals of Statistics 7, p. 1). Of very many images the others have none: it would
    take minutes to say that they are sure.

    Where all images are right, a bootstrap finds no doubt; so means over classes are at least as unsure as an accuracy.

    groups: of each image, such as its patient. Images of one group are right and wrong together, so whole groups are drawn
    (A. C. Davison and D. V. Hinkley, 1997, Bootstrap Methods and their Application, 3.8), for shares too; they are at least as
    unsure as if the images were independent, and where no resample differs, as if a group were one image.
    """
    number = len(outputs.labels)
    draw = Draw(number, seed, groups)
    least = {name: share_interval(values[name], number) for name in (*PROPORTIONS, *MEANS) if name in values}
    sure = {} if groups is not None else {name: least[name] for name in PROPORTIONS if name in values}
    if is_own(kind.name):
        return sure
    asking, given = asked(kind, classes, outputs)
    if RESAMPLES * sum(value.numel() for value in given.values()) > MOST_VALUES:
        return sure
    for name, numbers in resampled(asking, given, draw, RESAMPLES).items():
        if name in sure:
            continue
        if not np.isfinite(numbers).any():  # val has too few images for it
            continue
        low, high = np.nanpercentile(numbers, [2.5, 97.5]).tolist()
        if name in least:
            wide = [least[name]]
            if groups is not None and low == high:
                wide.append(share_interval(values[name], draw.units))
            low, high = min(low, *(ends[0] for ends in wide)), max(high, *(ends[1] for ends in wide))
        if low < high:
            sure[name] = low, high
    return sure


class Draw:
    """Resamples of a split's images. groups: of each image; None: each is drawn for itself."""

    def __init__(self, number: int, seed: int, groups: Sequence[str] | None) -> None:
        self.number, self.seed = number, seed
        place = {group: index for index, group in enumerate(dict.fromkeys(groups or []))}
        self.group_of = None if groups is None else torch.tensor([place[group] for group in groups])
        self.units = number if groups is None else len(place)

    def images(self, draw: int) -> Tensor:
        """The indices of the images that a resample has."""
        chosen = torch.randint(self.units, (self.units,), generator=seeding.generator(self.seed, "bootstrap", draw))
        if self.group_of is None:
            return chosen
        return torch.arange(self.number).repeat_interleave(chosen.bincount(minlength=self.units)[self.group_of])


class Drawing(Protocol):
    number: int  # of images to draw from

    def images(self, draw: int) -> Tensor:
        """The indices of those that this draw has."""
        ...


def asked(kind: TaskKind, classes: Sequence[str], outputs: Outputs) -> tuple[Asking, dict[str, Tensor]]:
    """The metric of a built-in task, and what its update takes of all images."""
    asking = Asking(kind.metrics(classes, "test"), f"task={kind.name}")
    asking.metric.distributed_available_fn = bool  # the first of several processes measures alone
    return asking, asking.given(outputs.logits, outputs.labels, kind)


def resampled(asking: Asking, given: Mapping[str, Tensor], draw: Drawing, draws: int) -> dict[str, np.ndarray]:
    """Name -> the metric in each of so many draws. given: of all images."""
    rows: list[dict[str, Any]] = []
    if isinstance(asking.metric, LabelMetrics):  # to rank all images again for each resample takes seconds
        at_once = max(1, AT_ONCE // draw.number)
        for start in range(0, draws, at_once):
            part = [draw.images(resample) for resample in range(start, min(start + at_once, draws))]
            drawn = torch.stack([chosen.bincount(minlength=draw.number) for chosen in part]).double()
            rows.append({name: each.numpy() for name, each in asking.metric.resampled(**given, drawn=drawn).items()})
    else:
        for resample in range(draws):
            chosen = draw.images(resample)
            asking.metric.reset()
            asking.metric.update(**{name: value[chosen] for name, value in given.items()})
            rows.append({name: np.array([value]) for name, value in asking.compute("").items()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
