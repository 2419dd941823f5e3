"""task=multilabel from the command line: a set with a known answer is learned, and measured, predicted and exported alike."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from src import api
from src.engine.runs.files import read_metrics
from tests import warm
from tests.conftest import check_error, command_environment
from tests.tasks.shapes import NAMES, write_shapes

pytestmark = pytest.mark.slow

COLUMNS = "data.label_columns=[disc,square,stripes]"
WORDS = (
    *("task=multilabel", "data=table", "data.image_size=64", "data.augment=none", "freeze.preset=head_only"),
    *("optimizer.lr=0.02", "trainer.max_epochs=3", "trainer.threads=1", "logger=csv"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a run called shapes."""
    folder = tmp_path_factory.mktemp("multilabel")
    write_shapes(folder)
    done = warm.run(
        "src.train", [*WORDS, "data.table=labels.csv", "name=shapes"], folder, command_environment(), timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def ours(folder, tmp_path) -> Path:
    """A copy of it where commands run."""
    return shutil.copytree(folder, tmp_path, dirs_exist_ok=True)


def metrics_of(run: Path) -> dict[str, float]:
    return json.loads((run / "result.json").read_text())["metrics"]


def test_the_answer_is_found_and_written_everywhere(folder):
    run = folder / "runs/shapes"
    found = metrics_of(run)
    assert {name.partition("/")[2] for name in found} == {"loss", "macro_f1", "map", "subset_acc"}
    assert found["test/macro_f1"] > 0.85
    assert found["test/map"] > 0.9
    printed = (folder / "printed.txt").read_text()
    assert "images    120 with 3 labels: " in printed
    assert "thresholds: chosen on val for the F1 of 3 labels" in printed
    rows = list(csv.DictReader((run / "labels.csv").open()))
    assert [row["label"] for row in rows] == [*NAMES]
    assert sum(float(row["f1"]) for row in rows) / 3 == pytest.approx(found["test/macro_f1"], abs=1e-6)
    assert sum(float(row["ap"]) for row in rows) / 3 == pytest.approx(found["test/map"], abs=1e-6)
    card = json.loads((run / "model/model.json").read_text())
    assert (card["task"], card["classes"]) == ("multilabel", [*NAMES])
    assert [float(row["threshold"]) for row in rows] == pytest.approx(card["task_values"]["thresholds"], rel=1e-5)
    assert "which of 3 labels an image has, perhaps none" in (run / "model/README.md").read_text()
    assert "square;stripes" in (run / "split.csv").read_text()
    assert {"train/macro_f1", "train/subset_acc", "val/map"} <= set(read_metrics(run / "metrics.csv")[0])


def test_evaluate_repeats_the_numbers_and_measures_other_tables(command, ours):
    done = command("evaluate", "run=runs/shapes")
    assert done.code == 0, done.text
    run = ours / "runs/shapes"
    again = json.loads((run / "evaluation_test.json").read_text())["metrics"]
    assert again == pytest.approx({name: value for name, value in metrics_of(run).items() if name in again}, abs=1e-6)
    assert (run / "evaluation_test_labels.csv").read_text() == (run / "labels.csv").read_text()
    done = command("evaluate", "model=runs/shapes/model", "data.table=columns.csv", COLUMNS, "out=.")
    assert done.code == 0, done.text
    assert "120 test images with 3 labels" in done.text
    (ours / "others.csv").write_text((ours / "labels.csv").read_text().replace("disc", "disk"))
    done = command("evaluate", "run=runs/shapes", "data.table=others.csv")
    check_error(done, 65, "1 labels of these images are unknown", "disk (did it mean disc?)")


def test_a_copy_of_the_model_predicts_the_labels(command, ours, folder):
    shutil.move(ours / "runs/shapes/model", ours / "copy")
    shutil.rmtree(ours / "runs")
    done = command("predict", "model=copy", "images=images", "out=p.csv")
    assert done.code == 0, done.text
    rows = list(csv.DictReader((ours / "p.csv").open()))
    assert [*rows[0]] == ["path", "labels", *(f"probability_{name}" for name in NAMES), "error"]
    truth = [line.partition(",")[2] for line in (ours / "labels.csv").read_text().splitlines()[1:]]
    right = [";".join(reversed(text.split("; "))) == row["labels"] for text, row in zip(truth, rows, strict=True)]
    assert sum(right) > 0.8 * len(right)
    thresholds = json.loads((ours / "copy/model.json").read_text())["task_values"]["thresholds"]
    for row in rows:
        shares = [float(row[f"probability_{name}"]) for name in NAMES]
        own = [name for name, share, least in zip(NAMES, shares, thresholds, strict=True) if share >= least]
        assert row["labels"] == ";".join(own)
    assert "next below its threshold" in done.out
    model = api.load(ours / "copy")
    assert api.predict(model, [ours / "images/000.png"]).shape == (1, 3)


@pytest.mark.needs("export")
def test_an_export_says_the_task_and_its_thresholds(command, ours):
    import onnx

    done = command("export", "run=runs/shapes", "format=onnx", "out=exported")
    assert done.code == 0, done.text
    about = {
        entry.key: json.loads(entry.value)
        for entry in onnx.load(next((ours / "exported").glob("*.onnx"))).metadata_props
    }
    assert (about["task"], about["classes"]) == ("multilabel", [*NAMES])
    assert len(about["task_values"]["thresholds"]) == 3


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_several_processes_measure_as_one_does_where_one_has_no_image_of_val(command, ours):
    """val is one image with all labels; the training images do not divide by the processes."""
    rows = (ours / "labels.csv").read_text().splitlines()[1:]
    val = next(row for row in rows if row.count(";") == 2)
    stated = [f"{row},{'val' if row == val else 'test' if number < 40 else 'train'}" for number, row in enumerate(rows)]
    (ours / "split.csv").write_text("\n".join(["path,label,split", *stated]) + "\n")
    words = (*WORDS, "data.table=split.csv", "data.class_weights=balanced", "trainer.max_epochs=2")
    for name, more in (("one", ()), ("two", ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"))):
        done = command("train", *words, *more, f"name={name}", cold=name == "two")
        assert done.code == 0, done.text
        assert "thresholds: 0.5 for 3 labels with fewer than 5 val images" in done.text
    for one, two in zip(*(read_metrics(ours / f"runs/{name}/metrics.csv") for name in ("one", "two")), strict=True):
        same = {name for name in one if name.startswith("val/")}
        assert {name: two[name] for name in same} == pytest.approx({name: one[name] for name in same}, abs=0.01)
        assert two["train/macro_f1"] == pytest.approx(one["train/macro_f1"], abs=0.05)
    assert metrics_of(ours / "runs/two") == pytest.approx(metrics_of(ours / "runs/one"), abs=0.05)
