"""src.compare, on folders that are written by hand: nothing of it needs a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from src.engine.runs.comparison import Run, _differences
from tests.conftest import check_error


def write_run(name: str, rows: list[str], metrics: dict[str, float], **config: Any) -> Path:
    """rows: predictions.csv; none: there is no such file."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    settings = {"name": name, "checkpoint": {"monitor": "val/acc"}, "optimizer": {"lr": 0.001} | config}
    (folder / "config.yaml").write_text(json.dumps(settings))
    intervals = {"test/acc": [0.5, 0.9]} if "test/acc" in metrics else {}
    (folder / "result.json").write_text(json.dumps({"state": "finished", "metrics": metrics, "intervals": intervals}))
    (folder / "metrics.csv").write_text("epoch,step,val/acc\n1,4,0.5\n2,8,0.7\n")
    if rows:
        (folder / "predictions.csv").write_text("\n".join(rows) + "\n")
    return folder


def of_classes(right: list[bool], prefix: str = "") -> list[str]:
    return ["path,true,predicted", *(f"{prefix}{number}.png,a,{'a' if ok else 'b'}" for number, ok in enumerate(right))]


def test_runs_are_compared_image_by_image(command):
    write_run("good", of_classes([True] * 20), {"test/acc": 1.0})
    write_run("poor", of_classes([True] * 10 + [False] * 10), {"test/acc": 0.5}, lr=0.1)
    write_run("close", of_classes([True] * 18 + [False] * 2), {"test/acc": 0.9})
    write_run("other", of_classes([True] * 20, "x"), {"test/acc": 0.9})
    write_run("old", [], {"test/acc": 0.9})
    done = command("compare", *(f"runs/{name}" for name in ("poor", "good", "close", "other", "old")))
    assert done.code == 0, done.text
    lines = done.out.splitlines()
    assert lines[0].split() == ["test", "accuracy"]
    assert lines[1] == "poor   0.5000 (0.50 to 0.90)"
    assert "optimizer.lr  0.1   0.001  0.001  0.001  0.001" in lines
    assert not any(line.startswith("name") for line in lines)
    test = "(McNemar's exact test)"
    assert f"10 images right by good alone, 0 by poor alone, p = 0.002 {test}: larger than chance" in done.out
    assert f"2 images right by good alone, 0 by close alone, p = 0.5 {test}: may be chance" in done.out
    assert "good and other are not comparable image by image: they have other test images, 0 in common" in done.out
    assert (
        "old has no predictions of its test images that can be compared: python -m src.evaluate run=runs/old"
        in done.out
    )
    assert "p must be below 0.013 instead of 0.05" in done.out
    assert Image.open("runs/comparison.png").size == (1200, 750)


@pytest.mark.parametrize("sure", [True, False])
def test_errors_and_labels_are_compared_in_pairs(sure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header = "path,true_age,predicted_age,error_age"
    errors = [1.0 if sure or number % 2 else -4.0 for number in range(30)]
    write_run("one", [header, *(f"{i},5,6,{error}" for i, error in enumerate(errors))], {"test/mae": 1.0})
    write_run("two", [header, *(f"{i},5,7,{-2.0 - i / 30}" for i in range(30))], {"test/mae": 2.0})
    (line,) = _differences([Run.read(Path("runs/two")), Run.read(Path("runs/one"))], "test")
    assert line.startswith("one against two: mean error smaller by ")
    assert line.endswith("larger than chance" if sure else "may be chance")
    labels = "path,true,labels,probability_cat"
    write_run("three", [labels, *(f"{i},cat;dog,dog;cat,0.5" for i in range(9))], {"test/subset_acc": 1.0})
    write_run("four", [labels, *(f"{i},cat;dog,dog,0.5" for i in range(9))], {"test/subset_acc": 0.0})
    (line,) = _differences([Run.read(Path("runs/three")), Run.read(Path("runs/four"))], "test")
    assert "9 images right by three alone, 0 by four alone" in line


def test_images_of_one_group_are_one_piece_of_evidence(tmp_path, monkeypatch):
    """60 images right by one run alone: of one or five groups that may be chance, of 20 it is not."""
    monkeypatch.chdir(tmp_path)
    for number, text, is_sure in ((1, "1 group", False), (5, "5 groups", False), (20, "20 groups", True)):
        for name, right in ((f"good{number}", True), (f"poor{number}", False)):
            rows = of_classes([right] * 60)
            rows = [rows[0] + ",group", *(f"{row},{index % number}" for index, row in enumerate(rows[1:]))]
            write_run(name, rows, {"test/acc": float(right)})
        (line,) = _differences([Run.read(Path(f"runs/{name}{number}")) for name in ("poor", "good")], "test")
        assert f"60 images right by good{number} alone, 0 by poor{number} alone" in line
        assert f"(randomisation test of {text})" in line
        assert line.endswith("larger than chance" if is_sure else "may be chance")


def test_what_is_no_run_is_said(command):
    write_run("one", of_classes([True]), {"test/acc": 1.0})
    write_run("two", of_classes([True]), {"test/acc": 1.0})
    (Path("runs/empty")).mkdir()
    check_error(command("compare", "runs/one"), 64, "one run is given")
    check_error(command("compare", "runs/one", "runs/empty"), 66, "no finished run", "python -m src.compare runs/one")
    check_error(command("compare", "runs/one", "gone"), 66, "gone is not a folder")
    done = command("compare")
    assert done.code == 64
    assert "python -m src.compare runs/a runs/b" in done.out
