"""Two models on the same images: what one gains, and whether that is chance."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from src.engine.runs.outputs import Outputs
from src.engine.runs.paired import mcnemar, metric_gain
from src.tasks.multiclass import Multiclass
from src.tasks.multilabel import Multilabel
from src.tasks.regression import Regression

NAMES = ("a", "b")


def named(kind):
    kind.name = type(kind).__name__.lower()
    return kind


def of_right(right: list[bool]):
    """A model of two classes that has these images right; all are of class a."""
    logits = torch.tensor([[1.0, 0.0] if each else [0.0, 1.0] for each in right])
    return named(Multiclass()), Outputs(logits, torch.zeros(len(right), dtype=torch.int64), [*range(len(right))])


def gain(ours: list[bool], theirs: list[bool], name: str = "acc", groups: list[str] | None = None):
    shares = sum(ours) / len(ours), sum(theirs) / len(theirs)
    return metric_gain(name, shares, NAMES, (of_right(ours), of_right(theirs)), 0, groups)


@pytest.mark.parametrize("counts", [(3, 10), (10, 3), (0, 6), (5, 5), (0, 0), (40, 90)])
def test_mcnemars_test_is_the_binomial_one(counts):
    expected = binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1.0
    assert mcnemar(*counts) == pytest.approx(expected)


def test_the_same_images_tell_more_than_as_many_others():
    """0.80 and 0.88 of 100 images have intervals of 0.08 on both sides, but all images that differ are for one model."""
    theirs = [True] * 80 + [False] * 20
    found = gain([True] * 88 + [False] * 12, theirs)
    assert (found.value, found.is_sure) == (pytest.approx(0.08), True)
    assert found.how == "p = 0.0078, McNemar's exact test"
    assert not gain([True] * 70 + [False] * 11 + [True] * 19, theirs).is_sure
    worse = gain(theirs, [True] * 88 + [False] * 12)
    assert (worse.value, worse.is_sure) == (pytest.approx(-0.08), True)


def test_images_of_a_group_are_not_many_images():
    theirs, ours = [True] * 40 + [False] * 8 + [True] * 40, [True] * 88
    assert gain(ours, theirs).is_sure
    together = gain(ours, theirs, groups=["p1"] * 40 + ["p2"] * 8 + ["p3"] * 40)
    assert not together.is_sure
    assert "by 3 groups" in together.how


def test_other_metrics_are_measured_on_the_same_resamples():
    """Two models that are wrong in nearly the same images: the intervals overlap, their difference is above 0."""
    labels = torch.arange(200) % 2
    right = torch.nn.functional.one_hot(labels, 2).float()
    theirs, ours = right.clone(), right.clone()
    theirs[:60], ours[12:60] = 1 - theirs[:60], 1 - ours[12:60]
    both = tuple((named(Multiclass()), Outputs(logits, labels, [*range(200)])) for logits in (ours, theirs))
    found = metric_gain("macro_f1", (0.76, 0.70), NAMES, both, 0, None)
    assert found.is_sure
    low, _, high = found.how.partition(",")[0].partition(" to ")
    assert 0 < float(low) < 0.06 < float(high) < 0.1


def test_of_errors_less_is_better():
    kind = named(Regression({"mean": (0.0,), "std": (1.0,)}))
    labels = torch.linspace(0, 1, 50)[:, None]
    both = tuple((kind, Outputs(labels + error, labels, [*range(50)])) for error in (0.1, 0.3))
    found = metric_gain("mae", (0.1, 0.3), ("age",), both, 0, None)
    assert (found.value, found.is_sure) == (pytest.approx(0.2), True)


def test_labels_are_all_right_or_not():
    labels = torch.ones(12, 2)
    ours, theirs = labels.clone(), labels.clone()
    theirs[:7, 0] = -1
    both = tuple((named(Multilabel()), Outputs(logits, labels, [*range(12)])) for logits in (ours, theirs))
    assert metric_gain("subset_acc", (1.0, 5 / 12), NAMES, both, 0, None).how == "p = 0.016, McNemar's exact test"


def test_what_cannot_be_compared_is_not():
    kind, outputs = of_right([True, False])
    other = Outputs(outputs.logits, outputs.labels, [0, 2])
    assert metric_gain("acc", (0.5, 0.5), NAMES, ((kind, outputs), (kind, other)), 0, None).is_sure is None
    assert metric_gain("own", (0.5, 0.5), NAMES, ((kind, outputs),) * 2, 0, None).is_sure is None
