"""All tasks by one table whose labels are 1 and 2: classes, labels and numbers alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_images

TASKS = ("multiclass", "binary", "multilabel", "regression")
WORDS = (
    *("data=table", "data.table=labels.csv", "data.batch_size=8", "data.image_size=32", "model.weights=none"),
    *("model.backbone=shufflenet_v2_x0_5", "trainer.max_epochs=1", "trainer.threads=1", "logger=csv"),
    "checkpoint.monitor=val/loss",
)
SCORES = {"multiclass": "acc", "binary": "acc", "multilabel": "map", "regression": "r2"}


@pytest.fixture
def table(tmp_path) -> Path:
    write_images(tmp_path / "images", {"1": 14, "2": 14}, size=40)
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(tmp_path.glob("images/*/*.png"))]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["path,label", *rows]))
    return table


def check_use(command, folder: Path, name: str) -> None:
    """A run is measured again, and a copy of its model/ predicts."""
    metrics = json.loads((folder / "runs" / name / "result.json").read_text())["metrics"]
    task = task_of(folder, name)
    assert {f"test/{SCORES[task]}", "test/loss"} <= metrics.keys()
    done = command("evaluate", f"run=runs/{name}")
    assert done.code == 0, done.text
    again = json.loads((folder / "runs" / name / "evaluation.json").read_text())["metrics"]
    assert again == {key: value for key, value in metrics.items() if key.startswith("test/")}
    copy = shutil.copytree(folder / "runs" / name / "model", folder / "copies" / task)
    done = command("predict", f"model={copy}", "images=images", f"out={task}.csv")
    assert done.code == 0, done.text
    assert len((folder / f"{task}.csv").read_text().splitlines()) == 29


def task_of(folder: Path, name: str) -> str:
    return json.loads((folder / "runs" / name / "model/model.json").read_text())["task"]


@pytest.mark.slow
@pytest.mark.needs("sweeps")
def test_a_sweep_trains_every_task(command, table):
    words = ("-m", "hydra/launcher=ray_tune", f"task={','.join(TASKS)}", "name=all")
    done = command("train", *WORDS, *words, cold=True)
    assert done.code == 0, done.text
    runs = sorted(path.parent.name for path in (table.parent / "runs/all").glob("*/result.json"))
    assert sorted(task_of(table.parent, f"all/{run}") for run in runs) == sorted(TASKS)
    for run in runs:
        check_use(command, table.parent, f"all/{run}")


@pytest.mark.slow
@pytest.mark.needs("export")
def test_binary_and_regression_are_exported_with_what_their_outputs_need(command, table):
    import onnx

    ways = {
        "binary": (("task.positive=1", "task.threshold=0.3"), {"threshold"}),
        "regression": (("model.loss=huber",), {"mean", "std"}),
    }
    for task, (more, values) in ways.items():
        done = command("train", *WORDS, f"task={task}", *more, f"name={task}")
        assert done.code == 0, done.text
        check_use(command, table.parent, task)
        done = command("export", f"run=runs/{task}", "format=onnx", f"out={task}")
        assert done.code == 0, done.text
        file = next((table.parent / task).glob("*.onnx"))
        about = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
        assert about["task"] == task
        assert about["task_values"].keys() == values
    model = json.loads((table.parent / "runs/binary/model/model.json").read_text())
    assert model["classes"] == ["2", "1"], "the positive class is the second"
    rows = [line.split(",") for line in (table.parent / "binary.csv").read_text().splitlines()[1:]]
    for _, name, _, first, share, *_ in rows:
        positive = float(share) if first == "1" else 1 - float(share)
        assert name == ("1" if positive >= 0.3 else "2")
