"""What a run says of its numbers: intervals, a calibration, a row per image; and several runs together."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from src import api
from src.engine.runs.intervals import share_interval
from tests import warm
from tests.conftest import SMALL, check_error, command_environment, write_images


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/plain, and runs/calibrated, which differs in model.calibrate alone."""
    folder = tmp_path_factory.mktemp("numbers")
    for name, words in (("plain", ()), ("calibrated", ("model.calibrate=temperature",))):
        done = warm.run("src.train", [*SMALL, *words, f"name={name}"], folder, command_environment(), timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / f"{name}.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def ours(trained: Path, tmp_path: Path) -> Path:
    """A copy of it where commands run."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_have_intervals_and_images_have_rows(command, ours):
    run = Path("runs/plain")
    result = read_json(run / "result.json")
    assert {"val/acc", "test/acc", "test/balanced_acc", "test/macro_f1"} <= result["intervals"].keys()
    assert result["intervals"]["test/acc"] == pytest.approx(share_interval(result["metrics"]["test/acc"], 9))
    assert result["calibration"] is None
    assert "  95 %  " in Path("plain.txt").read_text()
    assert "val       cannot tell epochs 1 to 2 apart (9 images: ±0." in Path("plain.txt").read_text()
    assert result["val_ties"]["epochs"] == [1, 2]
    if (page := run / "report.html").exists():
        assert "Val cannot tell epochs 1 to 2 apart" in page.read_text()
    low, high = result["intervals"]["test/acc"]
    assert f"({low:.2f} to {high:.2f})" in (run / "model/README.md").read_text()
    rows = rows_of(run / "predictions.csv")
    assert len(rows) == 9
    assert sum(row["true"] == row["predicted"] for row in rows) / 9 == pytest.approx(result["metrics"]["test/acc"])
    assert all(sum(float(cell) for key, cell in row.items() if key.startswith("probability_")) > 0.999 for row in rows)
    done = command("evaluate", "run=runs/plain")
    assert done.code == 0, done.text
    assert rows_of(run / "evaluation_test_predictions.csv") == rows
    again = read_json(run / "evaluation.json")
    assert again["intervals"] == {key: value for key, value in result["intervals"].items() if key.startswith("test/")}


def test_a_calibration_changes_probabilities_and_nothing_else(command, ours):
    plain, calibrated = (read_json(Path(f"runs/{name}/result.json")) for name in ("plain", "calibrated"))
    cards = [read_json(Path(f"runs/{name}/model/model.json")) for name in ("plain", "calibrated")]
    assert cards[0]["sha256"] == cards[1]["sha256"], "the weights are those without it"
    temperature = cards[1]["task_values"]["temperature"][0]
    assert calibrated["calibration"]["temperature"] == temperature != 1
    before, after = calibrated["calibration"]["val"]["nll"]
    assert after <= before
    assert after == pytest.approx(calibrated["metrics"]["val/loss"], rel=1e-5)
    assert before == pytest.approx(plain["metrics"]["val/loss"], rel=1e-5)
    assert plain["metrics"]["test/acc"] == calibrated["metrics"]["test/acc"]
    assert "calibrate test ECE " in Path("calibrated.txt").read_text()
    assert "calibrated on images like val alone" in Path("runs/calibrated/model/README.md").read_text()
    one, other = (api.load(f"runs/{name}", "cpu") for name in ("plain", "calibrated"))
    image = one.read(torch.arange(3 * 32 * 32).to(torch.uint8).reshape(3, 32, 32))[None]
    assert (one.logits(image) / temperature).equal(other.logits(image))
    done = command("compare", "runs/plain", "runs/calibrated")
    assert "model.calibrate  none   temperature" in done.out
    assert "0 images right by plain alone, 0 by calibrated alone, p = 1 " in done.out


def test_images_of_groups_have_intervals_by_group(command):
    """Two runs: each knows its groups when it measures, when it is measured again, and when the two are compared."""
    write_images(Path("photos"), {"a": 30, "b": 30})
    pattern = r"data.group=/(\d\d)"  # of a/012.png: 01
    words = [word for word in SMALL if not word.startswith("data=") and "num_images" not in word]
    words += ["data=image_folder", "data.root=photos", "data.image_size=32", "data.val_fraction=0.3", pattern]
    for name, lr in (("one", "0.001"), ("other", "0.1")):
        done = command("train", *words, "data.test_fraction=0.3", f"optimizer.lr={lr}", f"name={name}")
        assert done.code == 0, done.text
        assert "  95 % by group  " in done.out
    result = read_json(Path("runs/one/result.json"))
    assert result["intervals_by"] == "group"
    assert "bootstrap over the groups of images" in Path("runs/one/model/README.md").read_text()
    rows = rows_of(Path("runs/one/predictions.csv"))
    assert all(row["group"] == row["path"][2:4] for row in rows)
    assert all(row["group"] == row["path"][2:4] for row in rows_of(Path("runs/one/split.csv")))
    done = command("evaluate", "run=runs/one")
    assert "  95 % by group  " in done.out
    again = read_json(Path("runs/one/evaluation.json"))
    assert again["intervals"] == {key: value for key, value in result["intervals"].items() if key.startswith("test/")}
    done = command("compare", "runs/one", "runs/other")
    assert re.search(r"images? right by (one|other) alone, \d+ by (one|other) alone, p = ", done.out)
    assert re.search(r"randomisation test of (1 group|2 groups)\)", done.out)
    assert "may be chance" in done.out
    write_images(Path("other"), {"a": 3, "b": 3}, seed=1)
    (Path("other/a/000.png")).rename("other/a/first.png")
    done = command("evaluate", "run=runs/one", "data.root=other")
    assert done.code == 0, done.text
    assert "These images have no groups" in done.out
    assert "by group" not in done.out


@pytest.mark.needs("export")
def test_exports_have_the_temperature(ours, monkeypatch):
    """In the graph, and in the lines that load a state_dict."""
    from src.engine.export.formats import STATE_DICT

    monkeypatch.chdir(ours / "runs/calibrated/model")
    card = read_json(Path("model.json"))
    network = api.load(".", "cpu").network
    images = torch.arange(6 * 32 * 32).to(torch.uint8).reshape(2, 3, 32, 32)
    expected = network(images)
    batch = ({0: torch.export.Dim("batch", min=1)},)
    graph = torch.export.export(network, (images,), dynamic_shapes=batch).module()
    torch.testing.assert_close(graph(images), expected)
    torch.save(network.state_dict(), "model_state_dict.pt")
    scope: dict = {}
    exec(STATE_DICT.load, scope)
    assert scope["network"](images).equal(expected)
    network.temperature = 1.0
    torch.testing.assert_close(network(images) / card["task_values"]["temperature"][0], expected)
    assert not network(images).equal(expected)


@pytest.mark.needs("export")
def test_the_mean_of_several_is_exported_as_a_graph(command, ours):
    both = "run=[runs/plain,runs/calibrated]"
    check_error(command("export", both, "format=torch_export"), 64, "out= is missing", "out=mean")
    check_error(command("export", both, "format=safetensors", "out=mean"), 64, "cannot hold 2 models", "format=onnx")
    done = command("export", both, "format=torch_export", "out=mean")
    assert done.code == 0, done.text
    images = torch.arange(6 * 32 * 32).to(torch.uint8).reshape(2, 3, 32, 32)
    answers = [api.load(f"runs/{name}/model", "cpu").predict(images) for name in ("plain", "calibrated")]
    logits = torch.export.load("mean/model.pt2").module()(images)
    torch.testing.assert_close(logits.softmax(-1), torch.stack(answers).mean(0), rtol=1e-3, atol=1e-4)
    card = read_json(Path("mean/model.json"))
    assert (card["metrics"], card.get("task_values", {})) == ({}, {})


def test_answers_are_marked_and_several_models_have_a_mean(command, ours):
    write_images(Path("photos"), {"a": 3}, size=40)
    done = command("predict", "run=runs/plain", "images=photos", "min_confidence=0.99", "top_k=1")
    assert done.code == 0, done.text
    assert "unsure    3 of 3 images" in done.out
    rows = rows_of(Path("predictions.csv"))
    assert [row["unsure"] for row in rows] == ["unsure"] * 3
    assert [*rows[0]] == ["path", "class", "probability", "class_1", "probability_1", "unsure", "error"]
    command("predict", "run=runs/calibrated", "images=photos", "out=other.csv")
    done = command("predict", "run=[runs/plain,runs/calibrated]", "images=photos", "out=both.csv", "tta=flip")
    assert done.code == 0, done.text
    assert len(rows_of(Path("both.csv"))) == 3
    done = command("evaluate", "run=[runs/plain,runs/calibrated]")
    assert done.code == 0, done.text
    assert Path("runs/plain/evaluation_test_run_plain_calibrated.json").exists()
    words = ("run=runs/plain", "images=photos", "tta=flop")
    check_error(command("predict", *words), 64, "tta=flop", "tta=flip")
    check_error(
        command("embed", "run=runs/plain", "images=photos", "tta=flip"), 64, "tta is not a setting of src.embed"
    )
    refused = command("train", "task=regression", "data=table", "data.table=x.csv", "model.calibrate=temperature")
    check_error(refused, 64, "model.calibrate=temperature has no effect with task=regression")
