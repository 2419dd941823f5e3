"""What only a GPU shows: pytest -m gpu."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import SMALL, check_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_run_on_a_gpu(command, tmp_path, precision):
    """It learns what a CPU learns, its checkpoint continues, and evaluate repeats its numbers there and on a CPU."""
    words = (*SMALL, "trainer.accelerator=gpu", f"precision={precision}", "optimizer.lr=0.01", "trainer.max_epochs=4")
    done = command("train", *words, "name=gpu")
    assert done.code == 0, done.text
    result = json.loads((tmp_path / "runs/gpu/result.json").read_text())
    assert result["device"] == "cuda"
    assert result["peak_memory_mib"] > 0
    expected = {name: value for name, value in result["metrics"].items() if name.startswith("test/")}
    assert command("evaluate", "run=runs/gpu", "accelerator=gpu").code == 0
    repeated = json.loads((tmp_path / "runs/gpu/evaluation.json").read_text())["metrics"]
    assert repeated == pytest.approx(expected, abs=1e-4)
    assert command("predict", "run=runs/gpu", "images=nowhere").code == 66


def test_one_step_is_that_of_a_cpu(command, tmp_path):
    for accelerator in ("cpu", "gpu"):
        words = (
            *SMALL,
            f"trainer.accelerator={accelerator}",
            "trainer.max_steps=1",
            "freeze.preset=full",
            "freeze.batchnorm=keep",
        )
        assert command("train", *words, f"name={accelerator}").code == 0
    losses = [
        json.loads((tmp_path / f"runs/{name}/result.json").read_text())["metrics"]["val/loss"]
        for name in ("cpu", "gpu")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("policy", ["stop", "skip", "restore"])
def test_weights_that_explode(command, tmp_path, policy):
    words = (
        *SMALL,
        "freeze.preset=full",
        "optimizer=sgd",
        "optimizer.lr=100",
        "data.batch_size=4",
        "trainer.max_epochs=4",
    )
    done = command("train", *words, "trainer.accelerator=gpu", f"trainer.on_nan={policy}", "name=x")
    if policy != "restore":  # which finds a rate that does
        check_error(done, 77, "step ", "learning rate: backbone")
        assert not (tmp_path / "runs/x/model").exists()
    assert done.code in (0, 77), done.text
