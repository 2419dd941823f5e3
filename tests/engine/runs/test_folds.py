"""data.folds: all folds by one command, and each of them alone."""

from __future__ import annotations

import csv
import hashlib
import json
import statistics

import pytest

from src.config import Config, Data
from src.engine import features
from src.engine.images.groups import Together
from src.engine.runs.errors import UserError
from src.engine.runs.files import write_csv, write_json
from src.engine.runs.folds import train_folds
from src.engine.runs.run_lookup import fold_runs
from src.tasks.multiclass import Multiclass
from src.tasks.multilabel import Multilabel
from src.tasks.regression import Regression
from tests.conftest import WITH_PAGE, check_error, write_images

QUICK = (*WITH_PAGE[3:], "data.batch_size=16", "data.image_size=32", "trainer.max_epochs=1", "freeze.preset=head_only")


def rows_of(file):
    with file.open() as opened:
        return list(csv.DictReader(opened))


@pytest.mark.slow
def test_one_command_trains_all_folds_of_a_table_with_groups_and_does_not_repeat_a_finished_one(command, tmp_path):
    write_images(tmp_path / "photos", {"a": 12, "b": 12})
    rows = [[f"photos/{name}/{i:03d}.png", str(i + 7 * (name == "b"))] for name in "ab" for i in range(12)]
    write_csv(tmp_path / "ages.csv", ["path", "age"], rows)
    words = (*QUICK, "data=table", "data.table=ages.csv", "data.label_columns=[age]", "task=regression", "data.folds=2")
    words = (*words, r"data.group=/0*(\d+)[.]")  # photos/a/007.png and photos/b/007.png are of person 7
    alone = command("train", *words, "data.fold=1", "name=cv/fold_1")
    assert alone.code == 0, alone.text
    weights = tmp_path / "runs/cv/fold_1/model/model.safetensors"
    before = weights.stat().st_mtime_ns, hashlib.sha256(weights.read_bytes()).hexdigest()

    done = command("train", *words, "name=cv")
    assert done.code == 0, done.text
    assert "groups    12 for 24 images" in done.text
    assert "runs/cv/fold_1 is finished already" in done.text
    assert (weights.stat().st_mtime_ns, hashlib.sha256(weights.read_bytes()).hexdigest()) == before
    runs = fold_runs(tmp_path / "runs/cv")
    assert [run.name for run in runs] == ["fold_0", "fold_1"]
    splits = [{row["path"]: row["split"] for row in rows_of(run / "split.csv")} for run in runs]
    assert all((splits[0][name] == "test") != (splits[1][name] == "test") for name, _ in rows)
    assert all(split[f"photos/a/{i:03d}.png"] == split[f"photos/b/{i:03d}.png"] for split in splits for i in range(12))
    predictions = rows_of(tmp_path / "runs/cv/predictions.csv")
    assert sorted((row["path"], float(row["true_age"])) for row in predictions) == sorted(
        (path, float(age)) for path, age in rows
    )
    assert all(splits[int(row["fold"])][row["path"]] == "test" for row in predictions)
    result, *each = (json.loads((run / "result.json").read_text()) for run in (tmp_path / "runs/cv", *runs))
    values = [one["metrics"]["test/mae"] for one in each]
    assert result["metrics"]["test/mae"] == pytest.approx(statistics.mean(values))
    assert result["std"]["test/mae"] == pytest.approx(statistics.stdev(values))
    assert "look at   runs/cv/report.html" in done.text
    page = (tmp_path / "runs/cv/report.html").read_bytes()
    assert b"The 2 folds reach a mean test R2 of" in page
    assert b"Largest errors" in page
    assert page.count(b"<img") == 12
    assert command("report", "run=runs/cv").code == 0
    assert (tmp_path / "runs/cv/report.html").read_bytes() == page
    errors = [abs(float(row["true_age"]) - float(row["predicted_age"])) for row in predictions]
    assert statistics.mean(errors) == pytest.approx(result["metrics"]["test/mae"], rel=1e-4)  # the folds are of a size

    done = command("predict", "run=runs/cv", "images=photos/a", "out=all.csv")
    assert done.code == 0, done.text
    both = [command("predict", f"run=runs/cv/{run.name}", "images=photos/a", f"out={run.name}.csv") for run in runs]
    assert [one.code for one in both] == [0, 0]
    mean, *own = (
        [float(row["age"]) for row in rows_of(tmp_path / f"{name}.csv")] for name in ("all", "fold_0", "fold_1")
    )
    assert mean == pytest.approx([statistics.mean(pair) for pair in zip(*own, strict=True)], rel=1e-4)

    check_error(command("train", *words, "name=cv", "data.folds=3"), 64, "data.folds: 2 there, 3 now", "name=cv-2")
    check_error(command("train", *QUICK, "name=cv"), 64, "name=cv is the name of a run of folds", "name=cv-2")


@pytest.fixture
def folds(tmp_path, monkeypatch):
    """folds(fails=1): trains three folds, of which one fails; returns the folds that were trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "FEATURES", [])  # no report
    config = Config(name="cv", data=Data(source="digits", folds=3))

    def run(fails=None):
        trained = []

        def train(settings, path):
            fold = settings.data.fold
            trained.append((fold, settings.name, str(path)))
            if fold == fails:
                raise UserError("the disk is full", code=73)
            write_json(path / "config.yaml", {})
            write_json(path / "result.json", {"metrics": {"val/acc": fold / 10, "test/acc": None}, "wall_seconds": 1.0})
            write_csv(path / "predictions.csv", ["path", "label"], [[f"{fold}.png", "a"]])
            return 0.0

        (tmp_path / "runs/cv").mkdir(parents=True, exist_ok=True)
        for fold in range(3):
            (tmp_path / f"runs/cv/fold_{fold}").mkdir(exist_ok=True)
        return train_folds(config, train), trained

    return run


def test_the_error_of_a_fold_is_that_of_the_command(folds, tmp_path):
    with pytest.raises(UserError, match="the disk is full") as caught:
        folds(fails=1)
    assert caught.value.code == 73
    assert not (tmp_path / "runs/cv/result.json").exists()
    mean, trained = folds()
    assert mean == pytest.approx(0.1)
    assert trained == [(fold, f"cv/fold_{fold}", f"runs/cv/fold_{fold}") for fold in range(3)]
    assert json.loads((tmp_path / "runs/cv/result.json").read_text())["metrics"] == {"val/acc": pytest.approx(0.1)}
    assert [row["path"] for row in rows_of(tmp_path / "runs/cv/predictions.csv")] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data.folds=3", "data.fold=3"], "data.fold=3 does not go with data.folds=3"),
        (["data.fold=1"], "data.fold=1 has no effect with data.folds=null"),
        (["-m", "data.folds=3"], "data.fold=range(0,3)"),
        (["data.folds=3", "data=image_folder", "data.root=.", "data.split_file=split.csv"], "does not go with"),
    ],
)
def test_settings_that_contradict_folds_are_refused(command, words, named):
    done = command("train", *words)
    assert done.code == 64
    assert named in done.err


def test_torchrun_and_a_given_split_are_refused(command, tmp_path):
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    check_error(command("train", "data.folds=3", **launched), 64, "cannot be started by torchrun", "name=cv/fold_0")
    for part in ("train", "test"):
        write_images(tmp_path / "photos" / part, {"a": 4, "b": 4})
    words = (*QUICK, "data=image_folder", "data.root=photos", "data.folds=2")
    check_error(command("train", *words), 65, "data.folds=2 makes the splits, and the data states its own")


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (Multiclass(), ["cat"] * 40 + ["dog"] * 13 + ["rare"] * 5),
        (Multilabel(), ["cat;out"] * 20 + ["out"] * 20 + ["cat;rare"] * 5 + [""] * 13),
        (Regression(), [str(number) for number in range(200)]),
    ],
)
def test_folds_of_every_task_have_equal_sizes_and_a_share_of_each_label(kind, texts):
    folds = Together(strata=kind.strata).folds(texts, 0, 5)
    assert sorted(index for fold in folds for index in fold) == [*range(len(texts))]
    assert max(map(len, folds)) - min(map(len, folds)) <= 1
    strata = kind.strata(texts)
    for name in {name for own in strata for name in own}:
        counts = [sum(name in strata[index] for index in fold) for fold in folds]
        assert max(counts) - min(counts) <= 1, (name, counts)
    assert folds == Together(strata=kind.strata).folds(texts, 0, 5) != Together(strata=kind.strata).folds(texts, 1, 5)
