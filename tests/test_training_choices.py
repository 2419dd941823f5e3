"""Sampler, mixed images, losses, checkpointed gradients and patience in one run, from the command line."""

from __future__ import annotations

import pytest

from tests.conftest import SMALL, write_images
from tests.running import check_kill, result

EPOCHS = (
    "trainer.max_epochs=4",
    "trainer.patience=1",
    "trainer.min_delta=1",
)  # ends after the epoch that follows the first
WORDS = (
    *(*SMALL, *EPOCHS, "freeze.preset=full", "optimizer.lr=1e-3", "checkpoint.select=ema", "model.dropout=0.2"),
    *("data.sampler=balanced", "data.mix=cutmix", "model.loss=focal", "memory.checkpoint_gradients=true"),
)


def test_all_of_them_in_one_run(command, tmp_path):
    done = command("train", *WORDS, "name=all")
    assert done.code == 0, done.text
    assert "no better val/acc in 1 epoch: trainer.patience ends the run" in done.text
    assert "best epoch 1 of 2" in done.text
    assert result(tmp_path / "runs/all")["ended_by"] == "trainer.patience"


@pytest.mark.slow
def test_a_killed_run_of_all_of_them_ends_with_the_same_bits():
    check_kill(*WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_two_processes_and_other_tasks(command, tmp_path, task):
    write_images(tmp_path / "images", {"1": 20, "2": 20})
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(tmp_path.glob("images/*/*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    data = ["data=table", "data.table=labels.csv", "data.image_size=32", "checkpoint.monitor=val/loss", f"task={task}"]
    words = [word for word in WORDS if not word.startswith(("data=", "data.num_images", "data.sampler"))]
    words += ["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    sampler = ["data.sampler=balanced"] if task == "binary" else []
    done = command("train", *words, *data, *sampler, "name=two")
    assert done.code == 0, done.text
    assert result(tmp_path / "runs/two")["ended_by"] == "trainer.patience"
