"""The intervals of a split's metrics, by drawing its images again."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.engine.runs import bootstrap
from src.engine.runs.bootstrap import metric_intervals
from src.engine.runs.outputs import Outputs
from src.engine.steps.label_metrics import LabelMetrics
from src.tasks.multilabel import Multilabel

NAMES = ("cat", "dog", "owl", "rare")


def of_labels(images: int, names: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, many of them equal, and labels, of which the last is that of one image."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(images, names, generator=generator) < 0.4).float()
    labels[:, -1] = 0
    labels[0, -1] = 1
    return (torch.randn(images, names, generator=generator) + labels).mul(2).round().div(2), labels


def measured(kind, names, logits, labels):
    """The model, its outputs and the metrics of them, as metric_intervals takes them."""
    model = SimpleNamespace(kind=kind, card=SimpleNamespace(classes=names))
    metric = kind.metrics(names, "test")
    metric.update(predicted=kind.predicted(logits), labels=labels, logits=logits)
    return model, Outputs(logits, labels, [*range(len(labels))]), metric.compute()


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
