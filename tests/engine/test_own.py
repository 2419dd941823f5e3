"""Names of the owner's own code: what may be named, and what is said about a mistake before anything is imported."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torchmetrics import Metric

from src.engine import own
from src.engine.own import build_part, check_own, check_still_there, owner_errors
from src.engine.runs.errors import UserError
from src.engine.steps.metrics import SplitMetrics
from src.tasks.binary import Binary
from src.tasks.multiclass import Multiclass


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one file of the owner's, which must not be imported to be checked."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/my_heads.py").write_text(
        "import os\nfrom pathlib import Path\nSCALE = 3\nraise RuntimeError('imported')\n"
        "def cosine(in_features): pass\nclass Tiny: pass\ndef _hidden(): pass\n"
    )
    (tmp_path / "src/broken.py").write_text("def cosine(:\n    pass\n")
    monkeypatch.setattr(own, "PROJECT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["src.my_heads.cosine", "src.my_heads.Tiny"])
def test_what_a_file_defines_may_be_named_and_is_not_imported(project, name):
    check_own("model.head", name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("src.my_heads.cosin", "did you mean src.my_heads.cosine?"),
        ("src.my_head.cosine", "did you mean src.my_heads.cosine?"),
        ("src.my_heads.os", "defines no os"),
        ("src.my_heads.os.system", "there is no file src/my_heads/os.py"),
        ("src.my_heads.Path", "defines no Path"),
        ("src.my_heads._hidden", "defines no _hidden"),
        ("src.engine.runs.files.write_text", "outside src/engine/"),
        ("src.nothing.at_all", "there is no file src/nothing.py"),
        ("src.broken.cosine", "src/broken.py:1"),
    ],
)
def test_other_names_are_refused_with_the_nearest(project, name, said):
    with pytest.raises(UserError) as error:
        check_own("model.head", name)
    assert said in error.value.render()


def test_a_model_with_a_part_of_another_project_is_told_apart_from_a_damaged_one(tmp_path):
    with pytest.raises(ValueError, match=r"other\.my_heads\.cosine is a part of another project.* begin with src\."):
        check_still_there("other.my_heads.cosine", tmp_path)
    for name in ("resnet18", "mlp", "timm/resnet50.a1_in1k"):
        check_still_there(name, tmp_path)


def test_a_part_gets_what_it_asks_for_and_its_options():
    def part(outputs, scale=1):
        return outputs, scale

    given = {"in_features": 8, "outputs": 3}
    assert build_part("model.head", "part", {"part": part}, given, {}) == (3, 1)
    assert build_part("model.head", "part", {"part": part}, given, {"scale": 2}) == (3, 2)
    with pytest.raises(
        UserError, match=r"model.head_options.scal has no effect.*did you mean model.head_options.scale"
    ):
        build_part("model.head", "part", {"part": part}, given, {"scal": 2})
    with pytest.raises(UserError, match=r"model.head_options.outputs has no effect"):
        build_part("model.head", "part", {"part": part}, given, {"outputs": 2})
    with pytest.raises(UserError, match="needs a value for power"):
        build_part("model.head", "part", {"part": lambda power: power}, given, {})


def test_an_error_names_the_owners_line_and_not_the_engines(tmp_path, monkeypatch):
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "mine_that_fails.py"
    file.write_text("def part():\n    return 1 / 0\n")
    monkeypatch.setattr(own, "PROJECT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "src")
    import mine_that_fails

    name = "src.mine_that_fails.part"
    with pytest.raises(UserError, match="raised ZeroDivisionError") as error, owner_errors("model.head", name):
        mine_that_fails.part()
    assert error.value.where == "src/mine_that_fails.py:2"
    del sys.modules["mine_that_fails"]


def test_a_map_of_features_is_pooled_and_a_vector_stays():
    from src.models.network import pooled

    features = torch.arange(24.0).view(1, 6, 2, 2)
    assert torch.equal(pooled(features), features.flatten(2).mean(2))
    vector = torch.randn(2, 6, 1, 1)
    assert torch.equal(pooled(vector), vector.flatten(1))


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_an_own_loss_has_the_mean_and_the_class_weights_of_the_built_in_one(monkeypatch, weights):
    from src.engine.steps import task_kind
    from src.models import losses

    def plain(logits, labels):
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    monkeypatch.setattr(task_kind, "own_object", lambda key, name: plain)
    own_one = losses.ClassificationLoss(
        weights, 0.0, task_kind.own_loss("src.x.plain", {}, torch.zeros(2, 2), torch.tensor([0, 1]))
    )
    built_in = losses.ClassificationLoss(weights)
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(own_one(logits, labels), built_in(logits, labels))


def test_a_loss_that_is_a_mean_is_refused(monkeypatch):
    from src.engine.steps import task_kind

    monkeypatch.setattr(task_kind, "own_object", lambda key, name: nn.functional.cross_entropy)
    monkeypatch.setattr(own, "own_object", lambda key, name: nn.functional.cross_entropy)
    with pytest.raises(UserError, match="gives a result of shape") as error:
        task_kind.own_loss("src.x.mean", {}, torch.zeros(2, 3), torch.tensor([0, 1]))
    assert "the loss of each image" in error.value.why


class Right(Metric):
    """Counts the images that are right, and asks for probabilities."""

    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_state("right", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, probabilities, labels):
        right = (probabilities.argmax(1) == labels).sum()
        self.right = self.right + torch.stack([right, torch.tensor(len(labels))])

    def compute(self):
        return self.right[0] / self.right[1]


class Listed(Right):
    def __init__(self):
        super().__init__()
        self.add_state("all", [], dist_reduce_fx="cat")


def split_metrics(monkeypatch, kind, task=None):
    monkeypatch.setattr(own, "own_object", lambda key, name: kind)
    return SplitMetrics(task or Multiclass(), "ab" if task else "abc", "train", ["src.my_metrics.Right"])


@pytest.mark.parametrize(("task", "outputs"), [(None, 3), (Binary(), 1)])
def test_an_own_metric_that_asks_for_probabilities_agrees_with_the_accuracy(monkeypatch, task, outputs):
    metrics = split_metrics(monkeypatch, Right, task)
    for _ in range(3):
        labels = torch.randint(0, max(2, outputs), (7,))
        metrics.update(torch.tensor(1.0), torch.randn(7, outputs), labels, 7)
    values = metrics.compute()
    assert values["right"] == pytest.approx(values["acc"])
    metrics.reset()
    assert metrics.asking["right"].metric.right.sum() == 0


@pytest.mark.parametrize("world", [2, 1])
def test_the_sums_of_an_own_metric_are_part_of_the_position(monkeypatch, world):
    ranks = [split_metrics(monkeypatch, Right) for _ in range(2)]
    for metrics in ranks:
        metrics.update(torch.tensor(1.0), torch.randn(7, 3), torch.randint(0, 3, (7,)), 7)
    sums = {name: torch.stack([metrics.sums()[name] for metrics in ranks]) for name in ranks[0].sums()}
    later = [split_metrics(monkeypatch, Right) for _ in range(world)]
    for rank, metrics in enumerate(later):
        metrics.resume(sums, rank, world)
    assert torch.equal(
        sum(metrics.asking["right"].metric.right for metrics in later),
        sum(metrics.asking["right"].metric.right for metrics in ranks),
    )


def test_a_metric_that_keeps_all_images_or_is_none_is_refused(monkeypatch):
    with pytest.raises(UserError, match="a list, which grows"):
        split_metrics(monkeypatch, Listed)
    with pytest.raises(UserError, match="gives a Linear"):
        split_metrics(monkeypatch, lambda: nn.Linear(2, 2))
