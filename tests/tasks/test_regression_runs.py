"""task=regression from the command line: bars whose height and brightness the network has to read, and all that follows."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from src import api
from src.engine.runs.files import read_metrics
from tests import warm
from tests.conftest import Done, check_error, command_environment
from tests.distributed.test_ddp import DDP
from tests.running import result
from tests.tolerance import rounding

BARS = (
    *(
        "task=regression",
        "data=table",
        "data.table=bars/bars.csv",
        "data.label_columns=[size,year]",
        "data.image_size=32",
    ),
    *("data.crop_ratio=1.0", "data.augment=none", "trainer.threads=1", "trainer.accelerator=cpu", "logger=csv"),
)
QUICK = (*BARS, "model.backbone=shufflenet_v2_x0_5", "model.weights=none")


def write_bars(folder: Path, count: int) -> None:
    """Bars of a size, as bright as their year is late; bars.csv says both, turned.csv the other way round."""
    folder.mkdir()
    random, rows = np.random.default_rng(0), []
    for number in range(count):
        size, year = round(random.uniform(5, 45), 3), int(random.integers(1950, 2021))
        pixels = random.integers(0, 30, (48, 48, 3))
        pixels[48 - round(size) :, 8:40] += 2 * (year - 1950) + 60
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
        rows.append((f"{number:03d}.png", size, year))
    bars = [f"{name},{size},{year}" for name, size, year in rows]
    turned = [f"{year};{name};{size}" for name, size, year in rows]
    (folder / "bars.csv").write_text("\n".join(["path,size,year", *bars]))
    (folder / "turned.csv").write_text("\n".join(["Year;path;size", *turned]))


def go(folder: Path, name: str, *words: str) -> Done:
    done = warm.run(f"src.{name}", words, folder, command_environment(), timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


def values_of(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted values, (N, 2) each: size, year."""
    with file.open() as lines:
        header, *rows = csv.reader(lines)
    assert header == ["true_size", "predicted_size", "true_year", "predicted_year"]
    values = np.array(rows, dtype=float)
    return values[:, ::2], values[:, 1::2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With bars/ and a training of them in runs/bars, whose model/ lies in copy/ too."""
    folder = tmp_path_factory.mktemp("regression")
    write_bars(folder / "bars", 120)
    words = ("data.batch_size=8", "trainer.max_epochs=6", "optimizer.lr=3e-2", "freeze.preset=head_only")
    done = go(folder, "train", *BARS, *words, "name=bars")
    assert done.code == 0, done.text
    (folder / "printed.txt").write_text(done.text)
    shutil.copytree(folder / "runs/bars/model", folder / "copy/model")
    return folder


@pytest.mark.slow
@pytest.mark.needs("reports")
def test_the_answer_of_the_bars_is_found(folder):
    from tests.engine.reports.test_report import Page

    printed, metrics = (folder / "printed.txt").read_text(), result(folder / "runs/bars")["metrics"]
    assert "120 with 2 values each: 84 train, 18 val, 18 test" in printed
    assert "values    year: 1950 to 2020" in printed
    assert metrics["test/r2"] > 0.5
    true, predicted = values_of(folder / "runs/bars/values.csv")
    expected = {"r2": r2_score, "mae": mean_absolute_error, "rmse": root_mean_squared_error}
    for name, function in expected.items():
        assert metrics[f"test/{name}"] == pytest.approx(function(true, predicted), rel=1e-4), name
    page = Page(folder / "runs/bars/report.html")
    assert {"predicted and true values 1: size", "R2 of train and val over the epochs"} <= {
        attributes.get("aria-label") for _, attributes in page.tags
    }
    readme = (folder / "runs/bars/model/README.md").read_text()
    numbers = json.loads((folder / "runs/bars/model/model.json").read_text())["task_values"]
    assert f"size = {numbers['std'][0]:g} \\* output + {numbers['mean'][0]:g}, year = " in readme
    assert "A network that estimates size, year" in readme
    assert "Values: size, year" in readme
    assert "of the classes" not in readme
    assert "accuracy" not in readme


@pytest.mark.slow
def test_evaluate_gives_the_numbers_again_and_finds_columns_by_their_names(folder):
    assert go(folder, "evaluate", "run=runs/bars").code == 0
    expected = result(folder / "runs/bars")["metrics"]
    found = json.loads((folder / "runs/bars/evaluation.json").read_text())["metrics"]
    assert found == pytest.approx(
        {name: value for name, value in expected.items() if name.startswith("test/")}, rel=1e-5
    )
    for words, out in ((["run=runs/bars"], "of_run"), (["model=copy/model"], "of_model")):
        done = go(folder, "evaluate", *words, "data.table=bars/turned.csv", f"out={out}")
        assert done.code == 0, done.text
        assert "120 test images with 2 values each" in done.text
        true, predicted = values_of(folder / out / "evaluation_test_turned.csv_values.csv")
        assert true[0] == pytest.approx([30.478, 1986])
        assert r2_score(true, predicted) > 0.5
    (folder / "bars/years.csv").write_text("path,years,size\n000.png,1990,7\n")
    done = go(folder, "evaluate", "model=copy/model", "data.table=bars/years.csv")
    check_error(done, 65, "years.csv has no column year", "path, years, size")
    done = go(folder, "evaluate", "model=copy/model", "data.table=bars/years.csv", "data.label_columns=[size,years]")
    check_error(done, 65, "data.label_columns names size, years, but the model estimates size, year")


@pytest.mark.slow
def test_predict_and_the_api_give_the_tables_units(folder):
    done = go(folder, "predict", "model=copy/model", "images=bars")
    assert done.code == 0, done.text
    with (folder / "predictions.csv").open() as lines:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(lines)}
    assert list(rows["000.png"]) == ["path", "size", "year", "error"]
    with (folder / "runs/bars/split.csv").open() as lines:
        test = [row["path"] for row in csv.DictReader(lines) if row["split"] == "test"]
    _, predicted = values_of(folder / "runs/bars/values.csv")
    found = [[float(rows[name]["size"]), float(rows[name]["year"])] for name in test]
    assert np.array(found) == pytest.approx(predicted, rel=1e-4)
    answers = api.predict(api.load(folder / "copy/model", "cpu"), [folder / "bars" / name for name in test])
    assert answers.numpy() == pytest.approx(predicted, rel=1e-4)


def test_one_column_trains_and_predicts(tmp_path):
    """The column label, with model.loss=huber; the quick tier's run."""
    write_bars(tmp_path / "bars", 24)
    text = (tmp_path / "bars/bars.csv").read_text().replace("size", "label")
    (tmp_path / "bars/bars.csv").write_text(text)
    done = go(tmp_path, "train", *QUICK, "data.label_columns=[]", "model.loss=huber", "debug=true", "name=one")
    assert done.code == 0, done.text
    done = go(tmp_path, "predict", "run=runs/one", "images=bars")
    assert done.code == 0, done.text
    assert (tmp_path / "predictions.csv").read_text().startswith("path,label,error\n")


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Of 84 training images the last batch of 16 has 4, and of 18 to measure the last has 2."""
    write_bars(tmp_path / "bars", 120)
    words = (
        *QUICK,
        "data.batch_size=16",
        "optimizer=sgd",
        "optimizer.lr=0.01",
        "trainer.max_epochs=2",
        "freeze.batchnorm=keep",
    )
    for name, way in (("one", ()), ("two", (*DDP, "trainer.threads=1"))):
        done = go(tmp_path, "train", *words, *way, f"name={name}")
        assert done.code == 0, done.text
    ours, theirs = (read_metrics(tmp_path / "runs" / name / "metrics.csv")[-1] for name in ("one", "two"))
    allowed = rounding(layers=60, steps=12)
    for key in ("train/loss", "train/mae", "val/loss", "val/mae", "val/rmse"):
        assert theirs[key] == pytest.approx(ours[key], rel=allowed), key
    assert theirs["val/r2"] == pytest.approx(ours["val/r2"], abs=allowed)
