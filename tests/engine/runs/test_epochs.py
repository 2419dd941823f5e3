"""trainer.max_epochs=auto: 12 epochs, and more where few images make few steps."""

from __future__ import annotations

import pytest

from src.config import Config, Data, Trainer
from src.engine.runs.epochs import epochs_of
from tests.conftest import SMALL, check_error


def epochs(images: int, batch_size: object = 32, **trainer: object) -> int:
    return epochs_of(Config(data=Data(batch_size=batch_size), trainer=Trainer(**trainer)), images)


@pytest.mark.parametrize(("images", "expected"), [(40, 125), (160, 50), (640, 13), (672, 12), (10**6, 12)])
def test_a_run_has_at_least_250_steps_and_12_epochs(images, expected):
    assert epochs(images) == expected


def test_what_is_typed_counts():
    assert epochs(40, max_epochs=3) == 3
    assert epochs(64, max_steps=1000) == 500, "as many as the steps need"
    assert epochs(40, limit_batches=3) == 12, "a quick try"
    assert epochs(40, batch_size="auto") == 125, "it is found after the images are known"


def test_a_run_says_it_and_a_repeated_command_goes_on(command):
    words = ("data=synthetic", "data.num_images=30", *SMALL[3:5], "trainer.threads=1", "logger=csv", "baseline=none")
    small = ("name=x", "data.batch_size=16", "memory.detect_growth=false")
    done = command("train", *words, *small, "trainer.max_steps=9", "checkpoint.every_n_steps=1")
    assert done.code == 0, done.text
    assert "training  5 epochs, 9 steps of 16 images" in done.out
    assert "rates     head 0.003, backbone 0.0009 (adamw, cosine)" in done.out
    assert "epoch 5/5" in done.out
    done = command("train", *words, *small, "trainer.max_epochs=none")
    check_error(done, 64, "trainer.max_epochs=none")


@pytest.mark.needs("sweeps")
def test_hyperband_has_to_know_the_epochs_and_asha_does_not(command):
    words = ("-m", "hydra/sweeper=ray_tune", "optimizer.lr=0.1,0.2", "hydra.sweeper.dry_run=true")
    done = command("train", *words, "hydra.sweeper.scheduler=hyperband")
    check_error(done, 64, "trainer.max_epochs=auto")
    assert command("train", *words, "hydra.sweeper.scheduler=asha").code == 0
    assert command("train", *words, "hydra.sweeper.scheduler=hyperband", "trainer.max_epochs=4").code == 0
