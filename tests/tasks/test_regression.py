"""task=regression: what is a number, the split, the numbers against scikit-learn, what is refused, what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from torchmetrics import Metric

from src.config import Config, Model
from src.engine.images.image_files import split_image_set
from src.engine.images.labelled_images import ImageSet, LabelledImages
from src.engine.images.splits import SplitSettings
from src.engine.runs.errors import UserError
from src.engine.runs.evaluation import _with_names_of
from src.engine.runs.files import write_text
from src.engine.steps.metrics import SplitMetrics
from src.engine.steps.own_metrics import Asking
from src.tasks.regression import Regression
from tests.conftest import ROOT, check_error

NAMES = ("age", "weight")


def images(*columns: np.ndarray, names: tuple[str, ...] = NAMES) -> LabelledImages:
    """All in train, the first two in val too."""
    labels = [tuple(map(float, row)) for row in zip(*columns, strict=True)]
    splits = {"train": [*range(len(labels))], "val": [0, 1], "test": []}
    return LabelledImages(names[: len(columns)], [f"{i}.png" for i in range(len(labels))], labels, splits, torch.zeros)


def fitted(*columns: np.ndarray) -> Regression:
    kind = Regression()
    kind.fit(images(*columns))
    return kind


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("", "age is empty"), (" ", "age is empty"), ("3,5", "age has a decimal comma"), ("old", "age is no finite number"),
        *((cell, "age is no finite number") for cell in ("nan", "inf", "-Infinity", "1e99", "1_000", "1.2.3", "0x10", "٣"))
    ],
)  # fmt: skip
def test_a_cell_that_is_no_number_is_refused(cell, why):
    with pytest.raises(ValueError, match=why):
        Regression().label_text({"weight": "1", "age": cell})


@pytest.mark.parametrize("number", [0.1, -3.0, 12.0, 1e-30, 1 / 3, 1e22, 123456789.123, -0.0, 5e36])
def test_the_text_of_a_number_gives_it_back(number):
    kind = Regression()
    text = kind.label_text({"age": f" {number!r} ", "weight": f"{number:e}"})
    assert kind.labels([text], NAMES)[0][0] == number
    assert kind.label_text(dict(zip(NAMES, text.split(";"), strict=True))) == text
    assert kind.label_text({"age": "12.0"}) == kind.label_text({"age": "+12"}) == "12"


@pytest.mark.parametrize("text", ["{value!r}", "{value!r};{logarithm!r}"])
def test_every_split_has_small_and_large_values(text):
    order = np.random.default_rng(0).permutation(400)
    texts = [text.format(value=float(place**3), logarithm=float(np.log(place + 1))) for place in order]
    splits = Regression().split(texts, 0, 0.15, 0.15, None)
    assert {name: len(members) for name, members in splits.items()} == {"train": 280, "val": 60, "test": 60}
    for members in splits.values():
        assert np.bincount(order[members] // 40).tolist() == [len(members) // 10] * 10


def test_copies_stay_together():
    """Many values are equal: those of copies, which may lie at the end of a quantile, and others."""
    texts = [repr(float(value)) for value in np.sort(np.random.default_rng(0).lognormal(size=400).round(1))]
    copies = [f"{text}-{number % 2}" if number % 5 == 0 else str(number) for number, text in enumerate(texts)]
    splits = Regression().split(texts, 0, 0.15, 0.15, copies)
    assert sorted(chain(*splits.values())) == [*range(400)]
    split_of = {index: name for name, members in splits.items() for index in members}
    assert len({(copies[index], name) for index, name in split_of.items()}) == len({*copies})


def test_few_images_and_several_columns_are_split_too():
    for count in (3, 10, 39, 41):
        texts = [f"{number};{number**2};-1" for number in range(count)]
        sizes = [len(members) for members in Regression().split(texts, 0, 0.15, 0.15, None).values()]
        assert sizes == [count - 2 * max(1, round(0.15 * count)), *[max(1, round(0.15 * count))] * 2]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of what was resumed
@pytest.mark.parametrize("sizes", [(300,), (1, 299), (37,) * 8 + (4,)])
@pytest.mark.parametrize("offset", [0.0, 1e4, -5e5])
def test_metrics_are_those_of_scikit_learn(sizes, offset):
    """Over batches of any size and two processes, of values far from 0, in units that differ by six orders."""
    random = np.random.default_rng(1)
    true = random.normal(size=(300, 2)) * [1.7, 4e-6] + [offset, offset * 1e-6]
    labels = torch.tensor(true, dtype=torch.float32)
    kind = fitted(*true.T)
    logits = (
        torch.tensor((true + random.normal(size=true.shape) * [1, 1e-6] - true.mean(0)) / true.std(0)).float() + 0.1
    )
    parts, loss = [SplitMetrics(kind, NAMES, "val") for _ in range(2)], kind.loss(Config(), NAMES, labels)
    for number, (outputs, own) in enumerate(zip(logits.split(sizes), labels.split(sizes), strict=True)):
        parts[number % 2].update(loss(outputs, own), outputs, own, loss.weight(own))
    sums = {key: torch.stack([part.sums()[key] for part in parts]) for key in parts[0].sums()}
    whole = SplitMetrics(kind, NAMES, "val")
    whole.resume(sums, rank=0, world=1)  # of two processes, by one
    found, true, predicted = whole.compute(), labels.double(), kind.predicted(logits).double()
    assert found["r2"] == pytest.approx(r2_score(true, predicted), abs=1e-4)
    assert found["mae"] == pytest.approx(mean_absolute_error(true, predicted), rel=1e-3)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(true, predicted), rel=1e-3)
    assert found["loss"] == pytest.approx(F.mse_loss(logits, kind.standardised(labels)).item(), rel=1e-5)


def test_the_sums_lose_nothing_beside_a_million_others():
    """Errors of 1, then a million of 1e-4: float32 would add 1e-8 to a sum of 1e4 and keep 1e4."""
    kind = Regression({"mean": [0.0], "std": [1.0]})
    metric = kind.metrics(("age",), "val")
    metric.update(torch.ones(10_000, 1), torch.zeros(10_000, 1))
    for _ in range(1000):
        metric.update(torch.full((1000, 1), 1e-4), torch.zeros(1000, 1))
    assert metric.compute()["rmse"] == pytest.approx(((1e4 + 1e6 * 1e-8) / 1.01e6) ** 0.5, rel=1e-8)
    assert metric.compute()["mae"] == pytest.approx((1e4 + 1e6 * 1e-4) / 1.01e6, rel=1e-6)


def test_r2_is_of_the_columns_whose_values_differ():
    kind = Regression({"mean": [0.0, 7.0], "std": [1.0, 2.0]})
    metric = kind.metrics(NAMES, "val")
    metric.update(torch.tensor([[0.5, 1.0], [1.5, 1.1]]), torch.tensor([[0.0, 8.1], [2.0, 8.1]]))
    assert metric.compute()["r2"] == pytest.approx(0.75)
    metric.reset()
    metric.update(torch.tensor([[0.5, 1.0]]), torch.tensor([[0.3, 8.1]]))
    assert np.isnan(metric.compute()["r2"])


def test_the_loss_compares_standard_units_and_answers_are_in_the_tables():
    ages, weights = np.array([10.0, 20, 30, 60]), np.array([4001.0, 4002, 4003, 4004])
    kind = fitted(ages, weights)
    assert kind.values["mean"] == (30, 4002.5)
    assert kind.values["std"] == pytest.approx((ages.std(), weights.std()))
    labels = torch.tensor(np.stack([ages, weights], 1)).float()
    standard = kind.standardised(labels)
    torch.testing.assert_close(standard.mean(0), torch.zeros(2))
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(kind.answers(standard), labels)
    outputs = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)) * 3
    for name, expected in (
        ("mse", F.mse_loss),
        ("huber", F.huber_loss),
        ("src.tasks.regression.squared", F.mse_loss),  # as one's own
    ):
        loss = kind.loss(Config(model=Model(backbone="resnet18", loss=name)), NAMES, labels)
        torch.testing.assert_close(loss(outputs, labels), expected(outputs, standard))
        parts = [loss(outputs[part], labels[part]) * loss.weight(labels[part]) / 4 for part in ([0, 1, 2], [3])]
        torch.testing.assert_close(sum(parts), expected(outputs, standard))


def refused(found: LabelledImages) -> UserError:
    with pytest.raises(UserError) as caught:
        Regression().check(found, "ages.csv")
    return caught.value


def test_values_that_nothing_can_be_learned_from_are_refused():
    varied, constant = np.arange(50.0), np.full(50, 3.0)
    Regression().check(images(varied, varied), "ages.csv")
    assert "the train split has no two different values of weight" in refused(images(varied, constant)).found
    one_value = replace(images(varied), splits={"train": [*range(2, 50)], "val": [0], "test": []})
    assert "the val split has no two different values of age" in refused(one_value).found
    no_val = replace(one_value, splits={"train": [*range(50)], "val": [], "test": []})
    assert "it has 0 images" in refused(no_val).why


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6])
def test_an_offset_that_float32_cannot_carry_is_refused(scale):
    """float32 has 24 bits: at 2**n neighbours are 2**(n - 23) apart, which may be a thousandth of the spread."""
    values = np.tile([-scale, scale], 25)
    Regression().check(images(values + scale * 8000), "ages.csv")
    error = refused(images(values + scale * 20_000))
    assert "age" in error.found
    assert f"subtract an offset in the table, such as {scale * 20_000:g}" in error.fix[0]
    assert "too small" in refused(images(values / scale * 1e-37)).found


def test_odd_values_are_named():
    values = np.random.default_rng(0).normal(size=200)
    assert Regression().warning(images(values)) == ""
    values[7] = 1e3
    assert "age of 1 image is more than 8 std from the mean" in Regression().warning(images(values))
    assert "only 3 different values" in Regression().warning(images(np.arange(200) % 3))


@pytest.mark.parametrize(("labels", "why"), [(["1", "2;3"], "it needs 1 number"), (["1", "x"], "is no finite number")])
def test_an_own_source_with_other_labels_is_told(labels, why):
    own = ImageSet("own", ("age",), labels * 4, torch.zeros)
    with pytest.raises(UserError) as caught:
        split_image_set(own, Regression(), SplitSettings(0, 0.2, 0.2))
    assert why in caught.value.why


def test_an_own_source_may_give_numbers_and_not_in_another_order_than_the_model():
    own = ImageSet("own", ("age",), [20.5, 30, *range(40, 60)], torch.zeros)
    found = split_image_set(own, Regression(), SplitSettings(0, 0.2, 0.2))
    assert found.labels[:3] == [(20.5,), (30.0,), (40.0,)]
    assert (found.texts or [])[:2] == ["20.5", "30"]
    model: Any = SimpleNamespace(card=SimpleNamespace(classes=("age", "weight")), kind=Regression(), folder=None)
    pairs = LabelledImages(("weight", "age"), ["a"], [(1.0, 2.0)], {"test": [0]}, torch.zeros, texts=["1;2"])
    with pytest.raises(UserError, match="those of the model age, weight"):
        _with_names_of(model, pairs)
    assert _with_names_of(model, replace(pairs, classes=("age", "weight"))).labels == [(1.0, 2.0)]


class Top(Metric):
    def update(self, probabilities: torch.Tensor) -> None: ...

    def compute(self) -> None: ...


def test_a_metric_that_asks_for_probabilities_is_refused_before_the_first_image(monkeypatch):
    own = {"top": Asking(Top(), "metrics=src.my_metrics.Top")}
    monkeypatch.setattr("src.engine.steps.metrics.own_metrics", lambda entries, names: own)
    with pytest.raises(UserError, match="no probabilities"):
        SplitMetrics(Regression({"mean": [0.0], "std": [1.0]}), ("age",), "train", ["src.my_metrics.Top"])


def test_columns_of_another_table_are_those_of_the_model():
    kind = Regression()
    assert kind.columns(NAMES, []) == kind.columns(NAMES, [" Weight", "AGE"]) == NAMES
    with pytest.raises(UserError, match="names years, but the model estimates age, weight"):
        kind.columns(NAMES, ["years"])


@pytest.mark.needs("reports")
def test_the_report_shows_predicted_over_true_values(tmp_path):
    from src.engine.reports.report import write_report

    (tmp_path / "config.yaml").write_text(
        "data: {source: table, name: null, root: null, table: a.csv}\nmodel: {backbone: x}"
    )
    from tests.engine.reports.test_report import Page  # apart: without the room, the linter wants another order

    random = np.random.default_rng(0)
    true = random.normal(size=(50, 2)) * [10, 1e-6] + [100, 0]
    predicted = true + random.normal(size=(50, 2)) * [3, 1e-7]
    kept = torch.tensor(np.stack([true, predicted], 2)).flatten(1).float()
    Regression().write(tmp_path / "values.csv", ("<age>", "weight"), kept)
    page = Page(write_report(tmp_path))
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert labels == ["predicted and true values 1: <age>", "predicted and true values 2: weight"]
    (name, *numbers), (other, *small) = page.rows[-2:]
    assert (name, other) == ("<age>", "weight")
    expected = [
        function(true[:, 0], predicted[:, 0]) for function in (r2_score, mean_absolute_error, root_mean_squared_error)
    ]
    assert [*map(float, numbers)] == pytest.approx([*expected, true[:, 0].std()], abs=1e-4)
    assert float(small[3]) == pytest.approx(true[:, 1].std(), rel=1e-3)
    assert "50 images" in page.source
    write_text(tmp_path / "values.csv", "true_a,predicted_a\n" + "1,2\n" * 5000)
    assert "2,000 of 5,000 images" in Page(write_report(tmp_path)).source


@pytest.mark.needs("export")
def test_the_code_of_the_page_on_exports_gives_the_tables_units(tmp_path, monkeypatch):
    kind, outputs = fitted(np.arange(9.0), np.arange(9) * 1e-3 - 7), torch.randn(4, 2)
    (tmp_path / "model.json").write_text(json.dumps({"task": "regression", "task_values": kind.values}))
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec((ROOT / "docs/export.md").read_text().split("```python\n")[1].split("```")[0], scope)
    np.testing.assert_allclose(scope["answers"](outputs.numpy()), kind.answers(outputs).numpy(), rtol=1e-6, atol=1e-6)


TABLE = ("task=regression", "data=table", "data.table=ages.csv")
MISTAKES = [
    (["task=regression"], "task=regression does not go with data=digits", "data=table"),
    (["task=regression", "data=image_folder", "data.root=."], "does not go with data=image_folder", "data=table"),
    ([*TABLE, "model.loss=cross_entropy"], "model.loss=cross_entropy does not go with task=regression", "model.loss=mse"),
    (["model.loss=huber"], "model.loss=huber does not go with task=multiclass", "model.loss=cross_entropy"),
    ([*TABLE, "data.class_weights=balanced"], "data.class_weights=balanced has no effect with task=regression", "src.train"),
    ([*TABLE, "task.threshold=0.5"], "task.threshold=0.5 has no effect", "task=binary"),
    ([*TABLE, "task.positive=old"], "task.positive=old has no effect", "task=binary"),
    ([*TABLE, "data.label_columns=[age,Age]"], "names a column twice", "data.label_columns"),
    ([*TABLE, "checkpoint.monitor=val/acc"], "checkpoint.monitor=val/acc does not go with task=regression", "val/r2"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "found", "fix"), MISTAKES)
def test_a_setting_of_another_task_is_refused(command, tmp_path, words, found, fix):
    (tmp_path / "ages.csv").write_text("path,label\n")
    check_error(command("train", *words), 64, found, fix)


def test_a_wrong_cell_is_named_with_its_line(command, tmp_path):
    (tmp_path / "ages.csv").write_text("path,age\na.png,3.5\nb.png,nan\n")
    for name in "ab":
        (tmp_path / f"{name}.png").touch()
    done = command("train", *TABLE, "data.label_columns=[age]")
    check_error(done, 65, "ages.csv, line 3", "age is no finite number", "'nan'")
