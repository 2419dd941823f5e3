"""The baseline is measured beside every run, and is a run of its own with model=features."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from src.engine import features
from src.tasks.multiclass import Multiclass
from tests.conftest import WITH_PAGE, check_error, write_images
from tests.running import result
from tests.tasks.shapes import write_shapes
from tests.tasks.test_regression_runs import BARS, write_bars

WORDS = ("data=image_folder", "data.root=photos", "data.image_size=32", *WITH_PAGE[2:-1])


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos", {"apple": 20, "pear": 20, "plum": 14})


def test_a_run_says_what_it_has_to_beat_and_whether_it_did(command, tmp_path, photos):
    done = command("train", *WORDS, "name=one")
    assert done.code == 0, done.text
    first = done.out.index("baseline  val accuracy ")
    assert first < done.out.index("epoch 1/2")
    assert " with 95 % confidence) by a linear model on the features" in done.out
    baseline = result(tmp_path / "runs/one")["baseline"]
    assert set(baseline["metrics"]) == set(result(tmp_path / "runs/one")["metrics"])
    assert baseline["images"] == {"val": 8, "test": 8}
    assert f"baseline  {baseline['verdict']}" in done.out
    assert "McNemar" in baseline["verdict"]
    assert {"val/acc", "test/acc"} <= set(baseline["intervals"])
    assert "baseline  " not in command("train", *WORDS, "name=none", "baseline=none").out
    assert result(tmp_path / "runs/none")["baseline"] is None
    assert "baseline  " not in command("train", *WORDS, "name=debug", "debug=true").out


def test_it_is_a_run_of_its_own(command, tmp_path, photos):
    done = command("train", *WORDS, "model=features", "name=features")
    assert done.code == 0, done.text
    run = tmp_path / "runs/features"
    found = result(run)
    assert (found["epochs"], found["steps"], found["weights"]) == (0, 0, "the baseline")
    assert found["metrics"] == pytest.approx(found["baseline"]["metrics"], abs=1e-4)
    assert found["metrics"]["test/acc"] > 0.8
    assert "training  none" in done.out
    assert "no training" in done.out
    assert (run / "report.html").exists() == ("reports" in features.names())
    assert command("evaluate", "run=runs/features").code == 0
    repeated = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert repeated == {name: value for name, value in found["metrics"].items() if name.startswith("test/")}
    done = command("predict", "run=runs/features", "images=photos/plum")
    assert done.code == 0, done.text
    rows = (tmp_path / "predictions.csv").read_text().splitlines()[1:]
    assert sum(",plum," in row for row in rows) >= 10
    assert "is finished already" in command("train", *WORDS, "model=features", "name=features").out


def test_it_is_kept_where_training_does_not_beat_it(command, tmp_path, photos):
    done = command("train", *WORDS, "baseline=keep", "freeze.preset=head_only", "optimizer.lr=1e-9", "name=kept")
    assert done.code == 0, done.text
    found = result(tmp_path / "runs/kept")
    assert found["weights"] == "the baseline"
    assert found["epochs"] == 2
    assert found["metrics"] == pytest.approx(found["baseline"]["metrics"], abs=1e-4)
    assert "the baseline, which is better on val than any epoch" in done.out
    assert command("evaluate", "run=runs/kept", "split=val").code == 0
    metrics = json.loads((tmp_path / "runs/kept/evaluation.json").read_text())["metrics"]
    assert metrics["val/acc"] == found["metrics"]["val/acc"]


def test_without_features_it_is_refused_or_said(caplog):
    """A run of the baseline alone would package a random head."""
    from types import SimpleNamespace

    from src.engine.baseline.baseline import measure_baseline
    from src.engine.runs.errors import UserError

    def measured(choice, bank=None):
        config = SimpleNamespace(baseline=choice, trainer=SimpleNamespace(limit_batches=3))
        return measure_baseline(SimpleNamespace(config=config), None, bank)

    with pytest.raises(UserError, match="baseline=only"):
        measured("only")
    assert measured("show") is None
    assert not caplog.records
    assert measured("keep") is None
    assert "baseline=keep has no effect: there are no features" in caplog.text
    assert measured("keep", bank=object()) is None
    assert "baseline=keep has no effect: only a few steps are made" in caplog.text


@pytest.mark.slow
def test_images_that_all_broke_after_they_were_checked_are_said(command, tmp_path, photos):
    words = (*WORDS, "model=features", "data.on_bad_image=skip")
    assert command("train", *words, "name=first").code == 0
    for line in (tmp_path / "runs/first/split.csv").read_text().splitlines():
        if ",test," in f"{line},":
            path = photos / line.partition(",")[0]
            before = path.stat()
            path.write_bytes(b"x" * before.st_size)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for bank in (".features", ".images"):
        shutil.rmtree(tmp_path / "runs" / bank, ignore_errors=True)
    check_error(command("train", *words, "name=second"), 65, "none of the images to measure on can be read any more")


def test_it_is_not_kept_where_an_epoch_is_as_good(photos):
    """Equal on val: what was trained stays."""
    from types import SimpleNamespace

    from src.engine.baseline.baseline import unless_beaten
    from src.engine.baseline.verdict import Baseline
    from src.engine.runs.checkpoint_selection import BestCheckpoint, Score
    from src.engine.runs.selection import Chosen

    best = BestCheckpoint(photos, "val/acc")
    job = SimpleNamespace(config=SimpleNamespace(checkpoint=SimpleNamespace(monitor="val/acc")))
    loaded, chosen = [], Chosen(3, "epoch 3")
    task = SimpleNamespace(network=SimpleNamespace(load_state_dict=loaded.append))
    baseline = Baseline(Multiclass(), 1.0, as_epochs={"val/acc": 0.9, "val/loss": 0.5}, state={})
    for acc, loss, kept in ((0.9, 0.5, False), (0.95, 0.9, False), (0.85, 0.1, True), (0.9, 0.6, True)):
        best.kept = [Score(acc, loss, 2)]
        found = unless_beaten(job, task, SimpleNamespace(callbacks=[best]), chosen, baseline)
        assert (found.name == "the baseline") == kept, (acc, loss)
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["model.head=mlp"], "model.head=mlp"),
        (["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"], "strategy=ddp"),
    ],
)
def test_what_contradicts_it_is_refused(command, photos, words, culprit):
    check_error(command("train", *WORDS, "model=features", *words), 64, "baseline=only", culprit)


@pytest.mark.slow
def test_processes_wait_for_the_first(command, tmp_path, photos):
    ddp = ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    done = command("train", *WORDS, *ddp, "name=two")
    assert done.code == 0, done.text
    assert done.out.count("baseline  val accuracy") == 1
    assert command("train", *WORDS, "name=one").code == 0
    one, two = (result(tmp_path / "runs" / name)["baseline"]["metrics"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "metric", "least"),
    [
        (["task=multilabel", "data=table", "data.table=labels.csv"], "macro_f1", 0.85),
        ([*BARS], "r2", 0.5),
        (["task=binary", "data=image_folder", "data.root=photos"], "acc", 0.9),
    ],
    ids=["multilabel", "regression", "binary"],
)
def test_every_task_has_one(command, tmp_path, words, metric, least):
    """With the pretrained network that is installed: random features tell little."""
    write_shapes(tmp_path)
    write_bars(tmp_path / "bars", 120)
    write_images(tmp_path / "photos", {"apple": 20, "pear": 20})
    words = [word for word in words if not word.startswith(("model.", "trainer."))]
    done = command("train", *words, "data.image_size=64", "model=features", "trainer.threads=1", "logger=csv", "name=x")
    assert done.code == 0, done.text
    run = tmp_path / "runs/x"
    assert result(run)["metrics"][f"test/{metric}"] > least
    assert result(run)["metrics"] == pytest.approx(result(run)["baseline"]["metrics"], abs=1e-3), "thresholds too"
    assert result(run)["baseline"]["gain"] is None
    assert command("evaluate", "run=runs/x").code == 0
    repeated = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert repeated == {name: value for name, value in result(run)["metrics"].items() if name.startswith("test/")}
