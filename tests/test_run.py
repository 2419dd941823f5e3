"""Whole runs: what they leave, that they continue exactly, and that evaluate and predict repeat their numbers."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from src.engine.runs.files import sha256
from src.engine.runs.reading import read_checkpoint
from tests.conftest import ROOT, SMALL, check_error, command_environment, write_images
from tests.engine.images.odd_images import write_corrupt_images, write_odd_images
from tests.running import result, start, wait_for_rows, wait_for_save
from tests.tolerance import rounding


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_run_leaves_everything_about_it(command, tmp_path):
    done = command("train", *SMALL, "name=one", "logger.tensorboard=true")
    assert done.code == 0, done.text
    run = tmp_path / "runs" / "one"
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "events" not in path.name}
    assert {
        "config.yaml", "environment.json", "split.csv", "metrics.csv", "confusion.csv", "train.log", "result.json",
        "model_summary.txt", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "model/model.safetensors", "model/model.json",
        "model/README.md", "memory.csv", "checkpoints/previous.ckpt",
    } <= left  # fmt: skip
    assert list(run.glob("tensorboard/events*"))
    assert not [name for name in left if name.endswith((".tmp", ".pkl", ".pt"))]

    ended = result(run)
    assert ended["state"] == "finished"
    assert (ended["epochs"], ended["steps"]) == (2, 6)
    assert set(ended["metrics"]) == {
        f"{split}/{name}" for split in ("val", "test") for name in ("loss", "acc", "balanced_acc", "macro_f1")
    }
    rows = table(run / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    assert all(0 <= float(row["val/acc"]) <= 1 and float(row["train/loss"]) > 0 for row in rows)
    best = max(float(row["val/acc"]) for row in rows)
    assert ended["metrics"]["val/acc"] == pytest.approx(best, abs=1e-6)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["num_images"] == 60
    assert "state_dict: 338 tensors" in (run / "model_summary.txt").read_text()
    assert f"python -m src.evaluate run={Path('runs/one')}" in done.out

    again = command("train", *SMALL, "name=one", "logger.tensorboard=true")
    assert again.code == 0
    assert "finished already" in again.out
    assert result(run) == ended

    other = command("train", *SMALL, "name=one", "optimizer.lr=0.5")
    check_error(other, 64, "optimizer.lr: 0.003 there, 0.5 now", "model.weights=runs/one/model")
    check_error(command("train", *SMALL, "logger.tensorboard=true", "name=one", "resume=never"), 64, "exists already")
    with FileLock(run / ".lock"):
        check_error(command("train", *SMALL, "name=one"), 75, "another process is writing the run one")


def test_runs_without_a_name_never_share_a_folder(command, tmp_path):
    from src.engine.runs.run_names import claim

    paths = {claim(tmp_path, None) for _ in range(40)}
    assert len(paths) == 40
    assert all(path.is_dir() for path in paths)


def folder_of_images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", {"apple": 20, "pear": 20, "plum": 14})


FORWARD = rounding(layers=57)  # of a shufflenet_v2_x0_5
FOLDER = ("data=image_folder", "data.root=photos", "data.image_size=32", *SMALL[2:])


def test_evaluate_and_predict_repeat_the_runs_numbers(command, tmp_path):
    photos = folder_of_images(tmp_path)
    words = ("optimizer.lr=0.01", "data.num_workers=1", "data.class_weights=inverse")
    done = command("train", *FOLDER, "name=fruit", *words)
    assert done.code == 0, done.text
    run = tmp_path / "runs" / "fruit"
    trained = {name: value for name, value in result(run)["metrics"].items() if name.startswith("test/")}

    assert command("evaluate", "run=runs/fruit").code == 0
    assert json.loads((run / "evaluation.json").read_text())["metrics"] == trained
    assert command("evaluate", "run=runs/fruit", "split=val", "out=elsewhere", "data.batch_size=3").code == 0
    val = json.loads((tmp_path / "elsewhere" / "evaluation.json").read_text())["metrics"]
    expected = {name: value for name, value in result(run)["metrics"].items() if name.startswith("val/")}
    assert val == pytest.approx(expected, rel=FORWARD), "the size of a batch changes the weighted loss"

    # Folders in another order (a new first class that is empty of test images would shift every number by one).
    test_rows = [row for row in table(run / "split.csv") if row["split"] == "test"]
    for row in test_rows:
        target = tmp_path / "test_images" / row["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / row["path"], target)
    assert command("evaluate", "run=runs/fruit", "data.root=test_images", "out=others").code == 0
    elsewhere = json.loads((tmp_path / "others" / "evaluation.json").read_text())["metrics"]
    assert elsewhere == pytest.approx(trained, rel=FORWARD), "other images are measured with other class weights"
    shutil.rmtree(tmp_path / "test_images" / "apple")
    done = command("evaluate", "run=runs/fruit", "data.root=test_images", "out=others")
    assert done.code == 0, done.text
    confusion = table(tmp_path / "others" / "evaluation_confusion.csv")
    whole = table(run / "confusion.csv")
    assert confusion[1:] == whole[1:]
    assert all(cell == "0" for name, cell in confusion[0].items() if name != "true \\ predicted")

    predicted = command("predict", "run=runs/fruit", "images=photos", "out=by_run.csv")
    assert predicted.code == 0, predicted.text
    assert "by_run.csv has all 54 rows\n" in predicted.out
    by_path = {row["path"].removeprefix("photos/"): row for row in table(tmp_path / "by_run.csv")}
    counted: dict[tuple[str, str], int] = {}
    for row in test_rows:
        pair = (row["label"], by_path[row["path"]]["class"])
        counted[pair] = counted.get(pair, 0) + 1
    for row in whole:
        for name in ("apple", "pear", "plum"):
            assert counted.get((row["true \\ predicted"], name), 0) == int(row[name])

    shutil.move(run / "model", tmp_path / "elsewhere" / "model")
    shutil.rmtree(tmp_path / "runs")
    measured = command("evaluate", "model=elsewhere/model", "data.root=photos", "out=alone")
    assert measured.code == 0, measured.text
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    right = sum(row["path"].removeprefix("photos/").startswith(row["class"]) for row in table(tmp_path / "by_run.csv"))
    assert alone["images"] == 54
    assert alone["metrics"]["test/acc"] == pytest.approx(right / 54, abs=FORWARD)
    check_error(command("evaluate", "model=elsewhere/model"), 64, "model= needs images", "data.root=photos/")
    check_error(command("evaluate", "run=elsewhere/model"), 66, "without its run", "src.evaluate model=elsewhere/model")
    moved = command("predict", "model=elsewhere/model", "images=photos", "out=by_model.csv", "batch_size=7")
    assert moved.code == 0, moved.text
    columns = ("path", "class", "class_1", "class_2", "class_3", "error")
    rows = [
        [[row[name] for name in columns] for row in table(tmp_path / file)] for file in ("by_run.csv", "by_model.csv")
    ]
    assert rows[0] == rows[1]

    (photos / "banana").mkdir()
    shutil.copy(photos / "pear" / "000.png", photos / "banana")
    check_error(command("evaluate", "run=runs/fruit"), 66, "run=runs/fruit is not the folder of a run")
    check_error(command("predict", "model=runs", "images=photos"), 66, "runs holds no model: model.json is missing")
    check_error(command("predict", "model=elsewhere/model", "images=nowhere"), 66, "images=nowhere does not exist")
    (tmp_path / "elsewhere" / "model" / "model.safetensors").write_bytes(b"other bytes")
    check_error(command("predict", "model=elsewhere/model", "images=photos"), 65, "SHA-256")


def test_unknown_classes_at_evaluate_are_named(command, tmp_path):
    folder_of_images(tmp_path)
    assert command("train", *FOLDER, "name=fruit", "trainer.max_epochs=1").code == 0
    write_images(tmp_path / "new", {"apples": 3, "pear": 3})
    done = command("evaluate", "run=runs/fruit", "data.root=new")
    check_error(done, 65, "apples (did it mean apple?)", "the model knows apple, pear, plum")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_that_is_repeated_gives_the_undisturbed_result(command, tmp_path, workers):
    """kill -9 at whatever step it is; the same command again; the weights of the two runs are equal to the bit."""
    words = (
        *SMALL,
        "data.augment=standard",
        "model.dropout=0.3",
        "trainer.max_epochs=4",
        "freeze.unfreeze_epoch=1",
        "checkpoint.every_n_steps=1",
        "checkpoint.select=ema",
        "logger.tensorboard=false",
        f"data.num_workers={workers}",
    )
    assert command("train", *words, "name=undisturbed").code == 0
    runs = tmp_path / "runs"
    for kill_at_epoch in (1, 2):
        process = subprocess.Popen(
            [sys.executable, "-m", "src.train", *words, "name=killed"],
            cwd=tmp_path,
            env=command_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        saved = wait_for_save(runs / "killed", after_epoch=kill_at_epoch, process=process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert saved, "the run was over before it could be killed"
    done = command("train", *words, "name=killed")
    assert done.code == 0, done.text
    assert "continuing from" in done.out
    one, other = runs / "undisturbed", runs / "killed"
    assert sha256(one / "model" / "model.safetensors") == sha256(other / "model" / "model.safetensors")
    last = [read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (one, other)]
    for states in ([saved["state_dict"] for saved in last], [moving_average(saved) for saved in last]):
        assert states[0].keys() == states[1].keys()
        assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert result(one)["metrics"] == result(other)["metrics"]
    kept = [
        [(row["epoch"], row["step"], row["val/loss"], row["val/acc"]) for row in table(run / "metrics.csv")]
        for run in (one, other)
    ]
    assert kept[0] == kept[1]
    assert not list(other.rglob("*.tmp"))


def moving_average(checkpoint: dict) -> dict:
    return checkpoint["callbacks"]["WeightAverage"]["average"]


def test_sigterm_ends_with_143_and_the_position(command, tmp_path):
    """To the whole process group, as a kill of a job does; loader processes are in groups of their own."""
    words = (*SMALL, "trainer.max_epochs=30", "name=stopped", "data.num_workers=2")
    process = start(tmp_path, *words)
    rows = tmp_path / "runs" / "stopped" / "metrics.csv"
    while process.poll() is None and not rows.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    assert "stopped at step" in out
    assert "Repeat the command" in err
    assert result(tmp_path / "runs" / "stopped")["state"] == "interrupted"


def test_ctrl_c_ends_with_130_and_the_run_continues(command, tmp_path):
    words = (*SMALL, "trainer.max_epochs=30", "name=stopped", "checkpoint.every_n_steps=1")
    process = start(tmp_path, *words)
    assert wait_for_save(tmp_path / "runs" / "stopped", after_epoch=1, process=process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Repeat the command" in err
    assert len((out + err).splitlines()) < 40
    assert result(tmp_path / "runs" / "stopped")["state"] == "interrupted"


def test_a_sweep_has_one_folder_with_one_run_per_job(command, tmp_path):
    done = command("train", "-m", *SMALL, "trainer.max_epochs=1", "optimizer.lr=0.001,0.01", "name=sweep")
    assert done.code == 0, done.text
    assert {result(tmp_path / "runs" / "sweep" / job)["state"] for job in ("0", "1")} == {"finished"}
    rates = [
        yaml.safe_load((tmp_path / "runs" / "sweep" / job / "config.yaml").read_text())["optimizer"]["lr"]
        for job in ("0", "1")
    ]
    assert rates == [0.001, 0.01]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")) == ["sweep"]
    assert "optimizer.lr=0.01" in done.out


def test_a_folder_of_odd_and_broken_images(command, tmp_path):
    """26 odd modes and formats and 3 broken files: refused with every broken one named, trained on without them."""
    photos = write_images(tmp_path / "photos", {"a": 12, "b": 12}, seed=1)
    (photos / "b" / "odd").mkdir()
    odd = write_odd_images(photos / "b" / "odd")
    bad = write_corrupt_images(photos / "a")
    done = command("train", *FOLDER, "name=refused")
    check_error(done, 65, "3 of", *bad)
    assert set(bad) <= {
        Path(line.split("\t")[0]).name for line in (tmp_path / "runs/refused/bad_images.txt").read_text().splitlines()
    }
    done = command("train", *FOLDER, "name=skipped", "data.on_bad_image=skip")
    assert done.code == 0, done.text
    assert f"images    {24 + len(odd)} in 2 classes" in done.out
    assert not set(bad) & {Path(row["path"]).name for row in table(tmp_path / "runs/skipped/split.csv")}
    predicted = command("predict", "run=runs/skipped", "images=photos/a")
    assert predicted.code == 0, predicted.text
    errors = {Path(row["path"]).name for row in table(tmp_path / "predictions.csv") if row["error"]}
    assert errors == set(bad)


@pytest.mark.parametrize(
    "words",
    [
        ("model.head=mlp", "model.hidden=16", "precision=bf16"),
        ("task=binary", "data.num_classes=2", "data.class_weights=balanced"),
        ("optimizer=sgd", "optimizer.schedule=onecycle", "optimizer.warmup_fraction=0.3", "trainer.gradient_clip=1.0"),
        ("debug=true", "freeze.preset=gradual", "freeze.last_n=2", "model.label_smoothing=0.1"),
        ("model.head=append", "model.channels_last=false", "trainer.max_steps=2", "freeze.preset=full"),
    ],
    ids=lambda words: words[0],
)
def test_choices_that_go_together_work(command, tmp_path, words):
    from src.engine.steps.precision import cpu_has_bf16

    if "precision=bf16" in words and not cpu_has_bf16():
        check_error(command("train", *SMALL, *words), 69, "precision=bf16")
        words = tuple(word for word in words if word != "precision=bf16")
    done = command("train", *SMALL, "trainer.max_epochs=1", *words, "name=x")
    assert done.code == 0, done.text
    ended = result(tmp_path / "runs" / "x")
    assert ended["steps"] == (2 if "trainer.max_steps=2" in words else 6 if "debug=true" in words else 3)
    assert command("evaluate", "run=runs/x").code == 0
    again = json.loads((tmp_path / "runs" / "x" / "evaluation.json").read_text())["metrics"]
    assert again == {name: value for name, value in ended["metrics"].items() if name.startswith("test/")}
    shapes = {
        name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "runs/x/model/model.safetensors").items()
    }
    if "model.head=append" in words:
        assert shapes["backbone.fc.weight"] == (1000, 1024)
        assert shapes["head.weight"] == (3, 1000)
    if "task=binary" in words:
        assert shapes["head.weight"] == (1, 1024)


@pytest.mark.parametrize(("workers", "split"), [(0, "train"), (1, "test")])
def test_a_image_that_breaks_during_the_run_is_named(command, tmp_path, workers, split):
    """The check remembers files by size and time: with both kept, the damage shows only when the image is used."""
    photos = folder_of_images(tmp_path)
    words = (
        *FOLDER,
        f"data.num_workers={workers}",
        "trainer.max_epochs=1",
        "feature_bank.views=0",
    )  # which would not read it
    assert command("train", *words, "name=whole").code == 0
    spoilt = photos / next(row["path"] for row in table(tmp_path / "runs/whole/split.csv") if row["split"] == split)
    times = spoilt.stat()
    spoilt.write_bytes(bytes(times.st_size))
    os.utime(spoilt, ns=(times.st_atime_ns, times.st_mtime_ns))
    check_error(command("train", *words, "name=spoilt"), 65, str(spoilt.relative_to(tmp_path)), "broke while the run")


def test_a_continued_run_keeps_its_split_and_classes(command, tmp_path):
    """New images and a new class that arrive between two parts of a run do not change what it learns."""
    photos = folder_of_images(tmp_path)
    words = (*FOLDER, "name=fruit", "trainer.max_epochs=6")
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", *words],
        cwd=tmp_path,
        env=command_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert wait_for_rows(tmp_path / "runs/fruit", 2, process)
    process.kill()
    process.wait()
    split = (tmp_path / "runs/fruit/split.csv").read_text()
    write_images(photos, {"apple": 25, "banana": 9}, seed=5)
    done = command("train", *words)
    assert done.code == 0, done.text
    assert re.search(r"14 of \d+ images are left out", done.out)
    assert (tmp_path / "runs/fruit/split.csv").read_text() == split
    assert json.loads((tmp_path / "runs/fruit/model/model.json").read_text())["classes"] == ["apple", "pear", "plum"]


def test_a_run_that_is_out_of_time_has_a_result(command, tmp_path):
    done = command("train", *SMALL, "trainer.max_epochs=1000", "trainer.max_time=00:00:00:03", "name=short")
    assert done.code == 0, done.text
    assert result(tmp_path / "runs/short")["epochs"] < 1000
    assert len(table(tmp_path / "runs/short/metrics.csv")) == result(tmp_path / "runs/short")["epochs"]


def test_a_clone_does_not_run_the_code_of_another(tmp_path):
    """Another one is installed: `python src/train.py` would import that."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    line = [sys.executable, "src/train.py", "seed=1"]
    done = subprocess.run(line, cwd=tmp_path, env=command_environment(), capture_output=True, text=True)
    assert done.returncode == 64
    assert "would run the code of another clone" in " ".join(done.stderr.split())
    assert f"cd {tmp_path} && python -m src.train seed=1" in done.stderr
