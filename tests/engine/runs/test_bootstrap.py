"""The intervals of a split's metrics, by drawing its images again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from src.engine.runs import bootstrap
from src.engine.runs.bootstrap import Draw, metric_intervals
from src.engine.runs.intervals import share_interval
from src.engine.runs.outputs import Outputs
from src.engine.steps.label_metrics import LabelMetrics
from src.engine.steps.own_metrics import Asking
from src.tasks.multiclass import Multiclass
from src.tasks.multilabel import Multilabel
from src.tasks.regression import Regression

NAMES = ("cat", "dog", "owl", "rare")


def of_labels(images: int, names: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, many of them equal, and labels, of which the last is that of one image."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(images, names, generator=generator) < 0.4).float()
    labels[:, -1] = 0
    labels[0, -1] = 1
    return (torch.randn(images, names, generator=generator) + labels).mul(2).round().div(2), labels


def measured(kind, names, logits, labels):
    """The task, its names, outputs and the metrics of them, as metric_intervals takes them."""
    asking = Asking(kind.metrics(names, "test"), f"task={kind.name}")
    asking.update(logits, labels, kind)
    return kind, names, Outputs(logits, labels, [*range(len(labels))]), asking.compute("")


@pytest.mark.parametrize("at_once", [1000, 10**6])
def test_labels_have_the_intervals_that_measuring_each_resample_gives(at_once, monkeypatch):
    logits, labels = of_labels(60)
    monkeypatch.setattr(bootstrap, "AT_ONCE", at_once)
    quick = metric_intervals(*measured(Multilabel(), NAMES, logits, labels), seed=3)
    assert {"map", "macro_f1", "subset_acc"} == {*quick}
    monkeypatch.setattr(bootstrap, "LabelMetrics", type("NoMetric", (), {}))
    slow = metric_intervals(*measured(Multilabel(), NAMES, logits, labels), seed=3)
    assert {*slow} == {*quick}
    for name, interval in slow.items():
        assert quick[name] == pytest.approx(interval, rel=1e-6), name


def test_each_resample_has_the_metrics_of_its_images():
    logits, labels = of_labels(40)
    kind, number = Multilabel(), 40
    draws = torch.randint(number, (20, number), generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([chosen.bincount(minlength=number) for chosen in draws]).double()
    found = LabelMetrics(4, ranked=True).resampled(kind.predicted(logits), labels, logits, drawn)
    assert (~(labels[draws].any(1)[:, -1])).any(), "in some resamples no image has the last label"
    for place, chosen in enumerate(draws):
        metric = LabelMetrics(4, ranked=True)
        metric.update(kind.predicted(logits)[chosen], labels[chosen], logits[chosen])
        expected = metric.compute()
        assert {name: float(each[place]) for name, each in found.items()} == pytest.approx(expected, rel=1e-6)
        assert np.isfinite([*expected.values()]).all()


def of_classes(right: list[bool]):
    """Images of two classes; whether each is right."""
    labels = torch.arange(len(right)) % 2
    predicted = torch.tensor([label if ok else 1 - label for label, ok in zip(labels.tolist(), right, strict=True)])
    return torch.nn.functional.one_hot(predicted, 2).float(), labels


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_images_that_are_right_and_wrong_together_are_as_few_as_their_groups():
    """20 groups of 10 images, 14 of them right as a whole: as unsure as 14 of 20 images, and not as 140 of 200."""
    groups = [str(index // 10) for index in range(200)]
    args = measured(Multiclass(), ("a", "b"), *of_classes([index < 140 for index in range(200)]))
    alone, together = metric_intervals(*args, seed=0), metric_intervals(*args, seed=0, groups=groups)
    assert alone["acc"] == share_interval(0.7, 200)
    assert {*together} == {*alone} == {"acc", "balanced_acc", "macro_f1"}
    assert width(together["acc"]) == pytest.approx(width(share_interval(0.7, 20)), rel=0.15)
    assert all(width(together[name]) > 2 * width(alone[name]) for name in alone)


def test_groups_without_anything_in_common_change_little_and_never_narrow():
    right = [bool(value) for value in np.random.default_rng(0).random(300) < 0.8]
    args = measured(Multiclass(), ("a", "b"), *of_classes(right))
    alone = metric_intervals(*args, seed=0)["acc"]
    together = metric_intervals(*args, seed=0, groups=[str(index // 3) for index in range(300)])["acc"]
    assert width(alone) <= width(together) < 1.3 * width(alone)


def test_where_all_are_right_a_group_counts_as_one_image():
    args = measured(Multiclass(), ("a", "b"), *of_classes([True] * 50))
    found = metric_intervals(*args, seed=0, groups=[str(index // 10) for index in range(50)])
    assert found["acc"] == pytest.approx(share_interval(1.0, 5))


def test_values_and_labels_are_drawn_by_group_too():
    groups = [str(index // 10) for index in range(200)]
    logits = torch.tensor([2.0 * (index // 10 % 2) for index in range(200)])[:, None]
    kind = Regression(values={"mean": (0.0,), "std": (1.0,)})
    labels = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    args = measured(kind, ("age",), logits, labels)
    assert width(metric_intervals(*args, seed=0, groups=groups)["mae"]) > 2 * width(
        metric_intervals(*args, seed=0)["mae"]
    )
    args = measured(Multilabel(), NAMES, *of_labels(200))
    assert {*metric_intervals(*args, seed=0, groups=groups)} == {"map", "macro_f1", "subset_acc"}


def test_a_resample_has_whole_groups():
    groups = list("aabbbc")
    for resample in range(20):
        times = Draw(6, 0, groups).images(resample).bincount(minlength=6).tolist()
        assert times[0] == times[1]
        assert times[2] == times[3] == times[4]
        assert times[0] + times[2] + times[5] == 3
