"""A ResNet50 in stages from the command line: what one device gives, in one process and in several, and a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.engine.runs.reading import read_checkpoint
from tests import warm
from tests.conftest import SMALL, command_environment
from tests.running import result
from tests.tolerance import rounding

WORDS = (
    *SMALL,
    "model.backbone=resnet50",
    "data.augment=light",
    "trainer.accelerator=cpu",
    "freeze.batchnorm=keep",
    "optimizer=sgd",
    "optimizer.lr=0.001",
    "trainer.gradient_clip=1",  # a ResNet50 with random weights and no normalisation has huge ones
)
SPLIT = ("model=model_parallel_resnet50", "trainer.devices=2")
TWO_THREADS = "trainer.threads=2"  # where two stages compute at once each has one, and so sums in the same order
WAYS = {
    "single": ("feature_bank.views=0",),  # a network in parts has no bank
    "model_parallel": (*SPLIT, "strategy=model_parallel"),
    "threads": (
        *SPLIT,
        TWO_THREADS,
        "strategy=model_parallel",
        "strategy.micro_batches=3",
        "model.split_at=[layer3.1]",
    ),
    "pipeline": (*SPLIT, TWO_THREADS, "strategy=pipeline", "strategy.micro_batches=3", "model.split_at=auto"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with the same training done in four ways."""
    folder = tmp_path_factory.mktemp("split")
    for name, words in WAYS.items():
        typed = (*WORDS, *words, "model.weights=none", f"name={name}")
        done = warm.run("src.train", typed, folder, command_environment(), timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize(("one", "other"), [("single", "model_parallel"), ("threads", "pipeline")])
def test_the_same_micro_batches_give_the_same_to_the_bit(runs, one, other):
    expected, found = weights(runs / one), weights(runs / other)
    assert list(expected) == list(found)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert result(runs / one)["metrics"] == result(runs / other)["metrics"]


def test_micro_batches_are_the_batch_where_batchnorm_is_kept(runs):
    expected, found = (result(runs / name)["metrics"] for name in ("single", "pipeline"))
    assert found == pytest.approx(expected, rel=rounding(layers=54, steps=6))


@pytest.mark.parametrize("name", ["model_parallel", "pipeline"])
def test_what_comes_out_is_a_plain_resnet50(runs, name, command):
    """Measured again on one device; and another strategy finds nothing left to do in the finished run."""
    done = command("evaluate", f"run={runs / name}")
    assert done.code == 0, done.text
    assert f"{result(runs / name)['metrics']['test/loss']:.4f}" in done.out
    again = command("train", *WORDS, "model.weights=none", f"runs_dir={runs}", f"name={name}")
    assert again.code == 0, again.text
    assert "finished already" in again.out
