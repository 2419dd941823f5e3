"""The report of all folds: one page of what each fold's run says about the images that it has not learned from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from src.engine import features
from src.engine.reports import feature
from src.engine.reports.folds_report import write_folds_report
from src.engine.runs.files import write_csv, write_json, write_text
from src.engine.weights.preprocessing import Preprocessing
from tests.conftest import check_error
from tests.engine.reports.test_report import Page

NAMES = {"multiclass": "acc", "multilabel": "macro_f1", "regression": "rmse"}
COMMAND = "python -m src.train data=image_folder data.root=photos data.folds=3 name=cv"
CLASSES = (
    ["true", "predicted", "probability_cat", "probability_dog"],
    [["cat", "cat", 0.9, 0.1], ["dog", "cat", 0.8, 0.2]],
)
LABELS = (
    ["true", "labels", "probability_cat", "probability_dog"],
    [["cat;dog", "cat", 0.9, 0.1], ["dog", "dog", 0.2, 0.7]],
)
VALUES = (["true_age", "predicted_age", "error_age"], [[1.0, 1.5, 0.5], [3.0, 2.0, -1.0]])
ROWS = {"multiclass": CLASSES, "multilabel": LABELS, "regression": VALUES}


def write_folds(folder: Path, task: str, own: list[float], baselines: list[float | None]) -> Path:
    """The folder of as many folds as there are numbers, each tested on the two images of ROWS."""
    metric, (header, answers) = NAMES[task], ROWS[task]
    joined = []
    for fold, (value, baseline) in enumerate(zip(own, baselines, strict=True)):
        run = folder / f"fold_{fold}"
        run.mkdir(parents=True)
        config = {
            **{"name": f"cv/fold_{fold}", "model": {"backbone": "resnet18"}, "task": {"name": task}},
            "data": {"source": "image_folder", "root": "photos", "name": None, "fold": fold, "folds": 3},
            **{"checkpoint": {"monitor": f"val/{metric}"}, "optimizer": {"name": "adamw", "lr": 0.003}},
            **{"strategy": {"name": "single"}, "precision": {"name": "fp32"}, "report": {"explain": False}},
        }
        write_text(run / "config.yaml", yaml.safe_dump(config))
        result = {
            "state": "finished",
            "metrics": {f"test/{metric}": value},
            "epochs": 4,
            "best_epoch": 2,
            "command": COMMAND,
        }
        if baseline is not None:
            result["baseline"] = {"metrics": {f"test/{metric}": baseline}}
        write_json(run / "result.json", result)
        write_text(run / "report.html", "")
        names = [f"photos/{fold}{place}.png" for place in range(2)]
        write_csv(run / "split.csv", ["path", "label", "split"], [[name, "cat", "test"] for name in names])
        joined += [[name, fold, *row] for name, row in zip(names, answers, strict=True)]
    write_csv(folder / "predictions.csv", ["path", "fold", *header], joined)
    result = {
        "state": "finished",
        "folds": len(own),
        "runs": [f"fold_{fold}" for fold in range(len(own))],
        "command": COMMAND,
    }
    write_json(
        folder / "result.json", result | {"metrics": {f"test/{metric}": sum(own) / len(own)}, "wall_seconds": 1.0}
    )
    return folder


def shown() -> SimpleNamespace:
    return SimpleNamespace(
        config=SimpleNamespace(report=SimpleNamespace(explain=False)),
        read=lambda name: torch.zeros(3, 8, 8, dtype=torch.uint8),
        preprocessing=Preprocessing(8, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )


def page_of(folder: Path, images: object = None) -> Page:
    assert write_folds_report(folder, images) == folder / "report.html"
    return Page(folder / "report.html")


def test_it_judges_all_folds_and_leads_to_the_report_of_each(tmp_path):
    page = page_of(write_folds(tmp_path / "cv", "multiclass", [0.5, 0.4, 0.6], [0.1, 0.1, 0.1]), shown())
    assert (
        "The 3 folds reach a mean test accuracy of 0.5000, from 0.4000 to 0.6000 (standard deviation 0.1000)."
        in page.text
    )
    assert "On all 6 images together its 95 % interval is 0.188 to 0.812." in page.text
    assert "reaches 0.1000. The difference of 0.4000 may be chance." in page.text  # of six images
    assert page.rows[:6] == [
        ["", "images", "accuracy", "baseline"],
        *(["", "2", f"{value:.4f}", "0.1000"] for value in (0.5, 0.4, 0.6)),  # the text of a link is no cell's own
        ["mean", "", "0.5000", "0.1000"],
        ["std", "", "0.1000", "0.0000"],
    ]
    assert {"fold_0", "fold_1", "fold_2"} <= {*page.texts}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [f"fold_{fold}/report.html" for fold in range(3)]
    assert ["dog", "3", "0.0000", "0.00 to 0.56", "nan"] in page.rows
    assert (
        "3 of 6 images, each judged by the run that has not learned from it, were taken for another class." in page.text
    )
    assert page.headings == [
        *(
            "Result",
            "Classes",
            "Confusion matrix",
            "Most confident mistakes",
            "Least certain",
            "Calibration",
            "Settings",
        ),
        "Use the model",
    ]
    assert sum(tag == "img" for tag, _ in page.tags) == 3 + 6
    assert f"predict run={tmp_path}/cv" in page.text
    assert "fold: null" in page.text


@pytest.mark.parametrize(
    ("own", "baselines", "sentence"),
    [
        ([0.95, 0.94, 0.96] * 40, [0.60, 0.61, 0.60] * 40, "Training gained 0.3467, which is more than chance."),
        ([0.60, 0.61, 0.60] * 40, [0.95, 0.94, 0.96] * 40, "Training lost 0.3467, which is more than chance."),
        ([0.9, 0.5, 0.7], [0.5, 0.7, 0.6], "The difference of 0.1000 may be chance."),
        ([0.6] * 3, [0.5] * 3, "The difference of 0.1000 may be chance."),  # as good as one image in six
        ([0.6] * 3, [None] * 3, "There is no baseline to compare it with"),
    ],
)
def test_whether_training_gained_more_than_noise(tmp_path, own, baselines, sentence):
    text = page_of(write_folds(tmp_path / "cv", "multiclass", own, baselines)).text
    assert sentence in text
    assert ("learn more slowly" in text) == ("lost" in sentence)


def test_labels_and_values_have_their_own_tables(tmp_path):
    page = page_of(write_folds(tmp_path / "labels", "multilabel", [0.5, 0.4], [0.4, 0.4]))
    assert ["cat", "2", "2", "1.0000", "1.0000", "1.0000"] in page.rows
    assert ["dog", "4", "2", "1.0000", "0.5000", "0.6667"] in page.rows
    assert "Labels" in page.headings
    assert "mean test macro F1 of 0.4500" in page.text
    page = page_of(write_folds(tmp_path / "values", "regression", [0.5, 0.4, 0.6], [9.0, 9.1, 9.0]), shown())
    assert "Training gained 8.5333, which is more than chance." in page.text  # the less, the better
    assert ["age", "0.3750", "0.7500", "0.7906", "1.0000"] in page.rows
    assert "Largest errors" in page.headings


def test_it_is_made_again_and_folds_that_are_not_finished_are_an_error(command, tmp_path):
    folder = write_folds(tmp_path / "runs/cv", "multiclass", [0.5, 0.4, 0.6], [0.1, 0.1, 0.1])
    done = command("report", "run=runs/cv", "explain=true")
    assert done.code == 0, done.text
    assert "look at   runs/cv/report.html" in done.out
    assert "The page has no images: data.root=photos does not exist" in done.text
    assert "explain=true has no effect: each fold has a network of its own" in done.text
    assert "The 3 folds reach" in (folder / "report.html").read_text()
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "fold_2")
    check_error(command("report", "run=runs/cv"), 66, "2 of the 3 folds of cv are finished", COMMAND)


def wants(page: bool) -> Any:
    return SimpleNamespace(report=SimpleNamespace(page=page))


def test_the_folds_are_complete_without_the_page(tmp_path, caplog):
    assert feature.write_folds in [room.folds_report for room in features.FEATURES]
    with caplog.at_level("INFO"):
        feature.write_folds(tmp_path / "gone", wants(page=True))
    assert re.search(r"report.html could not be written; python -m src.report run=\S+gone says why", caplog.text)


def test_no_page_is_made_where_none_is_wanted(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        feature.subprocess, "run", lambda *words, **_: asked.append(words) or SimpleNamespace(returncode=1)
    )
    feature.write_folds(tmp_path, wants(page=False))
    assert asked == []
    feature.write_folds(tmp_path, wants(page=True))
    assert len(asked) == 1
