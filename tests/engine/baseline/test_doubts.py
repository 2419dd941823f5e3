"""Labels in doubt: those that were swapped come first."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from src.config import Config
from src.engine.baseline.doubts import suggestions, write_doubts
from src.engine.baseline.linear import fit_linear
from src.engine.images.labelled_images import LabelledImages
from src.engine.steps.task_kind import TaskKind
from src.models.losses import ClassificationLoss
from src.tasks.binary import Binary
from src.tasks.multiclass import Multiclass
from src.tasks.multilabel import Multilabel
from src.tasks.regression import Regression


@dataclass
class Learned:
    """As much of a task as labels in doubt need."""

    kind: TaskKind
    images: LabelledImages


def learned(kind: TaskKind, classes: tuple[str, ...], labels: list) -> Learned:
    names = [f"{number}.png" for number in range(len(labels))]
    everything = [*range(len(labels))]
    splits = {"train": everything[:-1], "val": [], "test": everything[-1:]}
    return Learned(kind, LabelledImages(classes, names, labels, splits, lambda index: torch.zeros(3, 8, 8)))


def written(path: Path, task: Learned, logits: Tensor) -> list[list[str]]:
    write_doubts(path, task, range(len(logits)), logits)
    with path.open() as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "split", "label", "suggested", "probability"]
    return rows


def test_most_of_the_listed_digits_are_those_that_were_swapped(tmp_path):
    digits, random = load_digits(), np.random.default_rng(0)
    swapped = random.choice(len(digits.target), len(digits.target) // 20, replace=False)
    labels = digits.target.copy()
    labels[swapped] = (labels[swapped] + random.integers(1, 10, len(swapped))) % 10
    features, order = torch.tensor(digits.data, dtype=torch.float32), random.permutation(len(labels)).tolist()
    torch.set_num_threads(1)
    model = fit_linear(features, torch.tensor(labels), ClassificationLoss().eval(), 10, order)
    task = learned(Multiclass(), tuple("0123456789"), labels.tolist())
    rows = written(tmp_path / "doubts.csv", task, model.held_out)
    was_swapped = [int(row[0].removesuffix(".png")) in swapped for row in rows]
    right = [row[3] == str(digits.target[int(row[0].removesuffix(".png"))]) for row in rows]
    assert np.mean(was_swapped[:40]) > 0.9
    assert np.sum(was_swapped) > 0.7 * len(swapped)
    assert np.mean(was_swapped) > 0.7
    assert np.mean(right) > 0.6
    assert {row[2] != row[3] for row in rows} == {True}


def test_a_class_counts_from_the_mean_probability_of_its_own_images_on():
    """Of class 1 the mean is 0.6, of class 0 0.7; of class 2 there is no image."""
    probabilities = torch.tensor(
        [[0.7, 0.3, 0.0], [0.35, 0.65, 0.0], [0.1, 0.9, 0.0], [0.7, 0.3, 0.0], [0.4, 0.6, 0.0]]
    )
    labels = torch.tensor([0, 0, 1, 1, 1])
    probabilities[0, 0] = 1.05  # a mean of 0.7
    assert suggestions(probabilities, labels).tolist() == [0, 1, 1, 0, 1]
    certain = torch.tensor([[0.5, 0.0, 0.5], [0.4, 0.0, 0.6]])
    assert suggestions(certain, torch.tensor([0, 0])).tolist() == [0, 0]


def test_images_that_no_model_left_out_are_not_judged(tmp_path):
    logits = torch.tensor([[-9.0], [9.0], [9.0], [float("nan")], [-9.0]])
    rows = written(tmp_path / "doubts.csv", learned(Binary(), ("cat", "dog"), [0, 1, 0, 1, 1]), logits)
    assert [row[:4] for row in rows] == [["2.png", "train", "cat", "dog"], ["4.png", "test", "dog", "cat"]]
    assert (
        written(tmp_path / "doubts.csv", learned(Binary(), ("cat", "dog"), [0]), torch.full((1, 1), float("nan"))) == []
    )


def test_each_of_several_labels_is_a_question_of_its_own(tmp_path):
    logits = torch.tensor([[9.0, -9.0], [9.0, 9.0], [-9.0, -9.0], [9.5, 9.0]])
    labels = [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.0, 1.0)]
    rows = written(tmp_path / "doubts.csv", learned(Multilabel(), ("cat", "out"), labels), logits)
    assert [row[:4] for row in rows] == [["3.png", "test", "not cat", "cat"], ["2.png", "train", "out", "not out"]]


@pytest.mark.parametrize("names", [("age",), ("age", "weight")])
def test_of_numbers_the_largest_residuals_are_in_doubt(tmp_path, names):
    values = torch.linspace(0, 40, 21)[:, None].repeat(1, len(names))
    kind = Regression({"mean": [0.0] * len(names), "std": [1.0] * len(names)})
    wrong = values.clone()
    wrong[3, 0] = 400
    wrong[5, -1] = 77
    task = learned(kind, names, [tuple(row) for row in wrong.tolist()])
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    rows = written(tmp_path / "doubts.csv", task, values + noise)
    assert [row[0] for row in rows] == ["3.png", "5.png"]
    assert rows[0][2] == ("400" if len(names) == 1 else "age 400")
    assert rows[0][4] == ""


def test_the_strength_is_that_of_before_and_every_image_is_held_out_once():
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > 0).long()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    model = fit_linear(features, labels, ClassificationLoss().eval(), 2, order)
    assert model.held_out.isfinite().all()
    assert (model.held_out.argmax(1) == labels).float().mean() > 0.8
    assert not torch.allclose(model.held_out, model.logits(features), atol=1e-3)
    few = fit_linear(features[:6], labels[:6], ClassificationLoss().eval(), 2, [*range(6)])
    assert few.held_out.isnan().all()
    assert Config().baseline == "show"
