"""Two models on the same images: what one gains, and whether that is chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from src.engine.runs.outputs import Outputs
from src.engine.runs.paired import Gain, compared_images, metric_gain
from src.engine.runs.text import plural
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
def test_images_that_are_right_or_wrong_have_the_binomial_test(counts):
    wins, losses = counts
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    gains = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 7)
    assert compared_images(gains, None) == (pytest.approx(expected), "McNemar's exact test")
    p, _ = compared_images(gains * 2, None)
    assert p == pytest.approx(expected, abs=0.03), "by drawing"


def test_few_groups_can_never_tell_and_equal_models_rarely():
    """Of 5 groups that are all for one model, chance does that in 2 of 32 cases."""
    for number, sure in ((1, False), (5, False), (8, True)):
        p, test = compared_images(np.ones(60), [f"patient {image % number}" for image in range(60)])
        assert (p < 0.05) == sure
        assert test == f"randomisation test of {plural(number, 'group')}"
    random = np.random.default_rng(0)
    groups = [str(image // 7) for image in range(42)]
    drawn = [random.normal(size=42) + random.normal(size=6).repeat(7) for _ in range(200)]
    assert sum(compared_images(gains, groups)[0] < 0.05 for gains in drawn) < 0.1 * len(drawn)


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
    assert together.how == "p = 1, randomisation test of 3 groups"


def test_other_metrics_are_no_surer_than_the_images():
    """4 images of 30 that one model alone has right may be chance, 16 are not; 60 in 2 groups may be."""
    labels = torch.arange(30) % 2
    for name in ("macro_f1", "balanced_acc"):
        assert not of_wins(labels, 4, name).is_sure
        assert of_wins(labels, 16, name).is_sure
        assert not of_wins(labels, 16, name, groups=[str(image < 15) for image in range(30)]).is_sure
    assert of_wins(labels, 16, "macro_f1").how == "p = 0.0025, randomisation test of 30 images"


def of_wins(labels: torch.Tensor, wins: int, name: str, groups: list[str] | None = None) -> Gain:
    ours = torch.nn.functional.one_hot(labels, 2).float()
    theirs = ours.clone()
    theirs[:wins] = 1 - theirs[:wins]
    both = tuple((named(Multiclass()), Outputs(logits, labels, [*range(len(labels))])) for logits in (ours, theirs))
    return metric_gain(name, (1.0, 1 - wins / len(labels)), NAMES, both, 0, groups)


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


def test_it_is_said_in_words():
    assert Gain(0.05, True, "p = 0.01").said() == "training gained 0.0500, more than chance (p = 0.01)"
    assert Gain(-0.05, False, "p = 0.2").said() == "training lost 0.0500, which may be chance (p = 0.2)"
    assert Gain(0.05, None).said() == "training gained 0.0500; it is not known whether by chance"
    assert Gain(0.0, False, "p = 1").said() == "training reached the same"
