"""A run that takes over another's checkpoint learns with its own settings, and one that resumes does not notice."""

from __future__ import annotations

import lightning as L
import pytest

from src.engine.runs.position import PositionCheckpoint
from src.engine.runs.writing import DurableCheckpointIO
from src.engine.sweeps import feature
from src.engine.sweeps.trial import Trial, working_on
from src.engine.sweeps.trial_report import OwnSettings
from tests.engine.runs.small_training import classifier, fit

SGD = {"name": "sgd", "momentum": 0.9}


class Rates(L.Callback):
    """The lr of every group in every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *arguments):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.fixture(autouse=True)
def impatient_plateau(monkeypatch):
    """It lowers lr after every validation."""
    monkeypatch.setattr("src.models.optimizers.PLATEAU_PATIENCE", -1)


def train(folder, epochs, resume=None, own=True, **optimizer):
    """Of a schedule of five epochs; returns (trainer, rates of its steps)."""
    rates = Rates()
    callbacks = [rates, PositionCheckpoint(folder), *([OwnSettings()] if own else [])]
    model = classifier(**optimizer)
    trainer = fit(model, epochs, *callbacks, resume=resume, plugins=[DurableCheckpointIO()])
    return trainer, rates.seen


def state_of(trainer):
    schedules = [one.scheduler.state_dict() for one in trainer.lr_scheduler_configs]
    weights = [tensor.tolist() for tensor in trainer.lightning_module.state_dict().values()]
    return weights, str(trainer.optimizers[0].state_dict()), str(schedules)


@pytest.mark.parametrize(("schedule", "epochs"), [("cosine", 1), ("plateau", 1), ("plateau", 2)])
@pytest.mark.parametrize("kind", [SGD, {"name": "adamw"}], ids=["sgd", "adamw"])
def test_a_run_of_the_same_settings_goes_on_exactly(tmp_path, kind, schedule, epochs):
    """One epoch ends in the warm-up, two end after it."""
    settings = kind | {"schedule": schedule, "lr": 0.0137, "warmup_fraction": 0.3}
    undisturbed, expected = train(tmp_path / "undisturbed", 3, own=False, **settings)
    train(tmp_path, epochs, **settings)
    continued, rates = train(tmp_path, 3, tmp_path / "last.ckpt", **settings)
    assert rates == expected[4 * epochs :]
    assert state_of(continued) == state_of(undisturbed)


@pytest.mark.parametrize(("schedule", "epochs"), [("cosine", 1), ("plateau", 1), ("plateau", 2), ("onecycle", 2)])
def test_the_learning_rate_is_this_runs_at_the_place_in_the_schedule(tmp_path, schedule, epochs):
    """A power of two, so that every rate is exactly that many times the other's."""
    settings = {"schedule": schedule, "warmup_fraction": 0.3}
    _, expected = train(tmp_path / "undisturbed", 3, lr=0.01, **settings)
    train(tmp_path, epochs, lr=0.01, **settings)
    trainer, rates = train(tmp_path, 3, tmp_path / "last.ckpt", lr=0.04, **settings)
    assert rates == [[4 * rate for rate in step] for step in expected[4 * epochs :]]
    assert [group["initial_lr"] for group in trainer.optimizers[0].param_groups] == [0.012, 0.012, 0.04, 0.04]
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.012, 0.012, 0.04, 0.04]


def test_the_other_options_are_this_runs(tmp_path):
    train(tmp_path, 1, **SGD, weight_decay=0.1)
    settings = {"name": "sgd", "momentum": 0.5, "weight_decay": 0.2}
    trainer, _ = train(tmp_path, 2, tmp_path / "last.ckpt", **settings)
    groups = trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0, 0.2, 0.0]
    assert {group["momentum"] for group in groups} == {0.5}
    assert groups[2]["params"][0] is trainer.lightning_module.network.head.weight


@pytest.mark.parametrize("now", [0.0, 0.5])
def test_a_backbone_that_did_not_learn_in_the_other_run(tmp_path, now):
    train(tmp_path, 1, schedule="constant", warmup_fraction=0.0, backbone_lr_scale=0.0)
    settings = {"schedule": "constant", "warmup_fraction": 0.0, "lr": 0.01, "backbone_lr_scale": now}
    _, rates = train(tmp_path, 2, tmp_path / "last.ckpt", **settings)
    assert rates == [[0.01 * now, 0.01 * now, 0.01, 0.01]] * 4


@pytest.mark.parametrize("copies", [False, True])
def test_only_a_trial_whose_checkpoints_are_copied_has_it(copies):
    with working_on(Trial(keeps_checkpoints=copies)):
        kinds = [type(callback) for callback in feature.callbacks(None, None)]
    assert (OwnSettings in kinds) is copies
