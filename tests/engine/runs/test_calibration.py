"""model.calibrate, intervals, and the mean of several models, without a training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from src.engine.runs.bootstrap import metric_intervals, share_interval
from src.engine.runs.calibration import calibration_errors, fit_temperature
from src.engine.runs.ensemble import Ensemble, combined
from src.engine.runs.errors import UserError
from src.engine.runs.model_folder import ModelCard
from src.engine.runs.outputs import Outputs
from src.engine.steps.task_kind import TaskKind
from src.engine.weights.preprocessing import Preprocessing
from src.tasks.binary import Binary
from src.tasks.multiclass import Multiclass
from src.tasks.multilabel import Multilabel
from src.tasks.regression import Regression

NAMES = ("a", "b", "c", "d")


def drawn(kind: TaskKind, number: int = 400, scale: float = 1.0) -> Outputs:
    """Labels that are drawn from the probabilities of the logits, and these logits times `scale`."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(number, kind.outputs(NAMES[:2] if isinstance(kind, Binary) else NAMES))
    probabilities = kind.probabilities(logits)
    labels = torch.bernoulli(probabilities) if kind.noun == "labels" else probabilities.multinomial(1)[:, 0]
    return Outputs(scale * logits, labels, list(range(number)))


@pytest.mark.parametrize("kind", [Multiclass(), Binary(), Multilabel()], ids=lambda kind: type(kind).__name__)
def test_the_temperature_undoes_a_factor_of_the_logits(kind):
    outputs = drawn(kind, scale=4.0)
    temperature = fit_temperature(kind, outputs)
    assert temperature == pytest.approx(4.0, rel=0.2)
    kind.values["temperature"] = (temperature,)
    errors = calibration_errors(kind, Outputs(outputs.logits / temperature, outputs.labels, outputs.members))
    assert errors["nll"][1] < 0.8 * errors["nll"][0]
    assert errors["ece"][1] < 0.5 * errors["ece"][0]


def test_a_few_images_that_are_all_right_do_not_make_it_certain():
    outputs = Outputs(torch.eye(4).repeat(5, 1) * 3, torch.arange(4).repeat(5), list(range(20)))
    assert 0.3 < fit_temperature(Multiclass(), outputs) < 1


def intervals(kind: TaskKind, outputs: Outputs, values: dict[str, float], seed: int = 0) -> Any:
    kind.name = type(kind).__name__.lower()
    return metric_intervals(kind, NAMES, outputs, values, seed)


def measured(kind: TaskKind, outputs: Outputs) -> dict[str, float]:
    metric = kind.metrics(NAMES, "test")
    given = {"logits": outputs.logits, "labels": outputs.labels, "predicted": kind.predicted(outputs.logits)}
    asked = type(metric).update.__code__.co_varnames[1 : type(metric).update.__code__.co_argcount]
    metric.update(**{name: given[name] for name in asked})
    return metric.compute()


def test_every_metric_of_every_task_has_an_interval_around_it():
    scaled = {"mean": (0.0,) * 4, "std": (1.0, 2.0, 3.0, 4.0)}
    regression = Regression(values=scaled)
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    values = Outputs(logits, regression.predicted(logits) + torch.randn(60, 4), list(range(60)))
    for kind in (Multiclass(), Multilabel(), regression):
        outputs = values if kind is regression else drawn(kind, 60)
        metrics = measured(kind, outputs)
        sure = intervals(kind, outputs, metrics)
        assert sure.keys() == metrics.keys()
        assert all(low <= metrics[name] <= high and low < high for name, (low, high) in sure.items()), sure
        assert intervals(kind, outputs, metrics) == sure, "the bootstrap has a seed"
    assert sure["mae"][1] - sure["mae"][0] > 0.05


def test_an_accuracy_has_wilsons_interval_and_images_that_are_all_right_are_no_certainty():
    outputs = Outputs(torch.eye(4).repeat(5, 1) * 9, torch.arange(4).repeat(5), list(range(20)))
    sure = intervals(Multiclass(), outputs, measured(Multiclass(), outputs))
    assert sure["acc"] == share_interval(1.0, 20)
    assert sure["balanced_acc"] == sure["macro_f1"] == share_interval(1.0, 20)


ANSWERS = {
    "multiclass": (Multiclass(), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])),
    "binary": (Binary(), torch.tensor([[0.7, 0.3], [0.1, 0.9]])),
    "multilabel": (Multilabel(), torch.tensor([[0.7, 0.2, 0.4]])),
    "regression": (Regression(values={"mean": (5.0, 100.0), "std": (2.0, 7.0)}), torch.tensor([[4.0, 120.0]])),
}


@pytest.mark.parametrize("task", ANSWERS)
def test_logits_of_a_mean_give_the_mean(task):
    kind, answers = ANSWERS[task]
    torch.testing.assert_close(kind.answers(kind.logits_of(answers)), answers)


def member(kind: TaskKind, make: Any, **card: Any) -> Any:
    """A model whose logits are make(images)."""
    about = {
        "architecture": {},
        "preprocessing": Preprocessing(64, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3),
        "classes": NAMES,
        "task": "multiclass",
        "background": (0, 0, 0),
        "max_megapixels": 100.0,
        "channels_last": False,
        "precision": "fp32",
        "metrics": {},
    }
    return SimpleNamespace(kind=kind, logits=make, card=ModelCard(**about | card), device="cpu", folder=None)


def test_an_ensemble_and_views_have_the_mean_of_the_probabilities():
    def by_left_edge(images: Tensor) -> Tensor:
        return images[:, 0, 0, :4].float()

    images = torch.arange(6, dtype=torch.uint8).expand(1, 3, 6, 6)
    edges = [torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[5.0, 4.0, 3.0, 2.0]])]
    flipped = Ensemble([member(Multiclass(), by_left_edge)], "flip")
    torch.testing.assert_close(flipped.predict(images), sum(edge.softmax(1) for edge in edges) / 2)
    assert Ensemble([member(Multiclass(), by_left_edge)], "five_crop").predict(images).sum() == pytest.approx(1)
    fixed = [member(Multiclass(), lambda images, edge=edge: edge) for edge in edges]
    torch.testing.assert_close(combined(fixed, "none").predict(images), sum(edge.softmax(1) for edge in edges) / 2)
    assert combined(fixed[:1], "none") is fixed[0]


def test_the_thresholds_of_an_ensemble_are_the_mean_and_other_classes_are_refused():
    kinds = [Multilabel(values={"thresholds": [0.2, 0.4]}), Multilabel(values={"thresholds": [0.6, 0.4]})]
    ensemble = Ensemble([member(kind, lambda images: images) for kind in kinds])
    assert ensemble.kind.values["thresholds"] == pytest.approx((0.4, 0.4))
    with pytest.raises(UserError, match="do not have the same classes"):
        Ensemble([member(Multiclass(), None), member(Multiclass(), None, classes=("x", "y"))])
    with pytest.raises(UserError, match="does not say how answers are averaged"):
        TaskKind().logits_of(torch.zeros(1, 2))


def test_columns_that_are_called_error_and_path_get_a_name_of_their_own():
    kind = Regression()
    header = ["path", *kind.header(["error", "path", "age"]), "error"]
    assert len({*header}) == len(header)
    assert kind.measured_row(["error", "age"], "3;40", [2.5, 41.0]) == ["3.0", "2.5", "-0.5", "40.0", "41.0", "1.0"]


def test_the_confidence_of_an_answer():
    assert Multiclass().confidence([0.1, 0.7, 0.2]) == 0.7
    assert Binary(threshold=0.3).confidence([0.6, 0.4]) == 0.4, "it is called positive"
    assert Multilabel().confidence([0.9, 0.4]) == 0.6
