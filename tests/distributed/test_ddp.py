"""strategy=ddp from the command line: the same images and the same result as one process, one folder, no job repeated."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.engine.runs.files import read_metrics
from src.engine.runs.reading import read_checkpoint
from tests import warm
from tests.conftest import SMALL, check_error, command_environment
from tests.running import result, start
from tests.tolerance import rounding

CPU = ("trainer.accelerator=cpu", "trainer.threads=2")
DDP = (*CPU, "strategy=ddp", "trainer.devices=2")
# 51 training images in batches of 16: the last has 3, which do not divide. BatchNorm is kept: its statistics are of the
# images that a process sees. 20 steps.
SAME = (
    *SMALL,
    "model.backbone=resnet18",
    "data.num_images=75",
    "data.class_weights=balanced",
    "data.augment=standard",
    "trainer.max_epochs=5",
    "freeze.batchnorm=keep",
    "optimizer=sgd",  # AdamW makes large steps of gradients that are nothing but rounding
    "optimizer.lr=0.003",
)

# A ResNet18 has 21 layers of weights. Where the processes' parts of a batch count alike, losses are 6e-3 apart and weights
# 2e-3.
LOSS = rounding(layers=21, steps=20)
WEIGHT = LOSS * 20 * 0.003  # a step moves a weight by at most the learning rate: its gradients sum up to about 1 here

NUMBERS = pytest.mark.numbers
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


WAYS = {
    "single": (),
    "dp": (
        *CPU,
        "strategy=dp",
        "trainer.devices=2",
        "trainer.threads=1",
    ),  # of two, one would wait busily for the other
    "ddp": (*DDP, "trainer.threads=1"),
    "ddp3": (*DDP, "trainer.devices=3", "data.num_workers=3"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """trained(name): the folder of the same training done in one of the WAYS, all side by side."""
    folder = tmp_path_factory.mktemp("same")

    @functools.cache
    def train(name: str) -> Path:
        typed = (*SAME, *WAYS[name], f"name={name}")
        done = warm.run("src.train", typed, folder, command_environment(), timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / "runs" / name

    return train


@pytest.mark.parametrize(
    "name", [pytest.param("dp", marks=[NUMBERS, pytest.mark.needs("dp")]), pytest.param("ddp", marks=NUMBERS), "ddp3"]
)
def test_the_result_is_that_of_one_device(trained, name):
    runs = trained("single"), trained(name)
    one, other = (read_metrics(run / "metrics.csv") for run in runs)
    assert [row["step"] for row in other] == [4, 8, 12, 16, 20]
    for ours, theirs in zip(one, other, strict=True):
        for key in ("train/loss", "val/loss"):
            assert theirs[key] == pytest.approx(ours[key], rel=LOSS), key
        for key in ("train/acc", "train/macro_f1", "val/acc", "val/balanced_acc"):
            assert theirs[key] == ours[key], key
    expected, found = (result(run)["metrics"] for run in runs)
    assert found == pytest.approx(expected, rel=LOSS)
    weights = [read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in runs]
    assert list(weights[0]) == list(weights[1]), "the checkpoint's keys differ"
    for key in weights[0]:
        torch.testing.assert_close(weights[1][key], weights[0][key], rtol=0, atol=WEIGHT, msg=key)


def test_several_processes_leave_one_folder(trained):
    single, several = trained("single"), trained("ddp3")
    left = {path.name for path in several.iterdir()}
    assert left - {path.name for path in single.iterdir()} == {"rank1.log", "rank2.log"}
    assert len(list(several.rglob("model.safetensors"))) == 1
    assert {path.name for path in several.parent.iterdir() if not path.name.startswith(".")} <= set(WAYS)
    assert result(several)["command"].startswith("python -m src.train")


def test_torch_does_not_call_the_setting_for_buffers_deprecated(trained):
    assert "broadcast_buffers" not in (trained("ddp") / "train.log").read_text()


@NUMBERS
def test_another_strategy_continues_the_run(trained, command, tmp_path):
    """What is saved does not depend on how many devices there were."""
    words = (*SAME, "name=ddp", f"runs_dir={tmp_path}")
    shutil.copytree(trained("ddp"), tmp_path / "ddp")
    (tmp_path / "ddp" / "result.json").unlink()
    last = tmp_path / "ddp" / "checkpoints" / "last.ckpt"
    last.rename(tmp_path / "ddp" / "checkpoints" / "previous.ckpt")  # of the last epoch; continues with its end
    done = command("train", *words)
    assert done.code == 0, done.text
    assert "continuing from" in done.out
    assert result(tmp_path / "ddp")["metrics"] == pytest.approx(result(trained("single"))["metrics"], rel=LOSS)


def test_a_sweep_over_numbers_of_devices_repeats_no_job(command, tmp_path):
    """Lightning's own launcher runs the whole sweep again in every process, and waits for ever at 2,1."""
    done = command("train", "-m", *SMALL, *CPU, "strategy=ddp", "trainer.devices=2,1", "name=sweep")
    assert done.code == 0, done.text
    jobs = sorted(path for path in (tmp_path / "runs" / "sweep").iterdir() if path.is_dir())
    assert [job.name for job in jobs] == ["0", "1"]
    assert [len(list(job.glob("rank*.log"))) for job in jobs] == [1, 0]
    assert [result(job)["steps"] for job in jobs] == [6, 6]
    assert len(list((tmp_path / "runs").rglob("result.json"))) == 2
    assert [json.loads((job / "environment.json").read_text())["command"].count(" -m ") for job in jobs] == [2, 2]


def test_what_one_process_finds_wrong_is_printed_once(command, tmp_path):
    """The message of the process that failed first, with its exit code, not what followed from it."""
    done = command("train", *SMALL, *DDP, "name=wrong", "model.num_classes=7")
    check_error(done, 65, "model.num_classes=7, but the data has 3 classes")
    assert done.err.count("ERROR") == 1


def test_a_process_that_raises_is_named_with_the_runs_own_log(tmp_path):
    """In the middle of training, in process 1 alone."""
    (tmp_path / "sitecustomize.py").write_text("""
import builtins, os, sys
real = builtins.__import__
def patched(*arguments, **keywords):
    imported = real(*arguments, **keywords)
    kind = getattr(sys.modules.get("src.models.classifier"), "Classifier", None)
    if kind is not None:
        builtins.__import__ = real
        def fail(*arguments):
            raise ValueError("a mistake of process 1")
        kind.on_train_batch_end = fail
    return imported
if os.environ.get("RANK") == "1":
    builtins.__import__ = patched
""")
    process = start(tmp_path, *SMALL, *DDP, "name=raised", PYTHONPATH=f"{tmp_path}:{warm.ROOT}")
    printed = "".join(process.communicate(timeout=100))
    assert process.returncode == 70, printed
    assert "unexpected ValueError: a mistake of process 1" in printed
    assert "process 1 of the 2 processes" in printed
    log = "runs/raised/rank1.log"
    assert f"trace   {log}" in printed
    assert "Traceback" in (tmp_path / log).read_text()
    assert printed.count("ERROR") == 1


@NUMBERS
def test_fewer_images_than_processes(command, tmp_path):
    """Two each to train, to validate and to test, for three processes: one has nothing and must not be waited for in vain."""
    words = (*SMALL, *CPU, "data.num_images=6", "data.num_classes=2", "data.image_size=32", "trainer.threads=1")
    words += ("data.batch_size=6", "freeze.batchnorm=keep", "optimizer=sgd", "strategy.timeout_seconds=30")
    words += ("trainer.max_epochs=1",)
    for name, others in {"one": (), "three": ("strategy=ddp", "trainer.devices=3")}.items():
        chosen = [word for word in words if others or not word.startswith("strategy")]
        done = command("train", *chosen, *others, f"name={name}")
        assert done.code == 0, done.text
    one, three = (result(tmp_path / "runs" / name)["metrics"] for name in ("one", "three"))
    assert three == pytest.approx(one, rel=LOSS)
    rows = [read_metrics(tmp_path / "runs" / name / "metrics.csv")[-1] for name in ("one", "three")]
    for key in ("val/loss", "val/acc", "train/loss"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=LOSS), key
