"""trainer.patience: which epoch ends a run, also where it was killed between; and the setting that result.json names."""

from __future__ import annotations

import pytest

from src.engine.runs.patience import Patience, ended_by
from src.engine.runs.position import PositionCheckpoint, StopAtMaxSteps
from src.engine.runs.writing import LAST, DurableCheckpointIO
from tests.engine.runs.small_training import classifier, fit, freezing

NAN = float("nan")


def train(folder, monkeypatch, values, epochs=8, resume=False, first_epoch=0, **patience):
    """Each epoch's val metric is given."""
    model = classifier(8)
    numbers = iter(values)
    monkeypatch.setattr(model.val_metrics, "compute", lambda: {"loss": 1.0, "acc": 0.5} | {"acc": next(numbers)})
    callback = Patience("val/acc", **({"patience": 2, "min_delta": 0.0, "first_epoch": first_epoch} | patience))
    position = PositionCheckpoint(folder)
    start = folder / LAST if resume else None
    callbacks = (freezing(8, preset="full"), StopAtMaxSteps(1000), callback, position)
    trainer = fit(model, epochs, *callbacks, resume=start, plugins=[DurableCheckpointIO()])
    return trainer, model


@pytest.mark.parametrize(
    ("values", "first_epoch", "min_delta", "trained"),
    [
        ([0.1, 0.2, 0.2, 0.1], 0, 0.0, 4),
        ([0.1, 0.2, 0.2, 0.3, 0.3, 0.2], 0, 0.0, 6),
        ([0.1, 0.25, 0.3, 0.34], 0, 0.1, 4),
        ([0.9, NAN, NAN], 0, 0.0, 3),
        ([0.9, 0.5, 0.4, 0.3, 0.35, 0.34, 0.33], 3, 0.0, 7),  # the best of a phase before says nothing
    ],
)
def test_it_ends_after_so_many_epochs_without_a_better_one(
    tmp_path, monkeypatch, values, first_epoch, min_delta, trained
):
    trainer, _ = train(tmp_path, monkeypatch, values, first_epoch=first_epoch, min_delta=min_delta)
    assert (trainer.current_epoch, trainer.global_step) == (trained, 4 * trained)
    assert ended_by(trainer) == "trainer.patience"


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_run_that_was_killed_ends_with_the_same_epoch_and_weights(tmp_path, monkeypatch, killed_after):
    """Killed after the last epoch it trains no further one."""
    values = [0.1, 0.2, 0.2, 0.1]
    _, expected = train(tmp_path, monkeypatch, values)
    stopped, _ = train(tmp_path, monkeypatch, values[:killed_after], epochs=killed_after)
    assert stopped.current_epoch == killed_after
    trainer, model = train(tmp_path, monkeypatch, values[killed_after:], resume=True)
    assert (trainer.current_epoch, trainer.global_step, ended_by(trainer)) == (4, 16, "trainer.patience")
    for name, tensor in expected.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name


def test_patience_that_cannot_end_the_run_is_said(tmp_path, monkeypatch, caplog):
    trainer, _ = train(tmp_path, monkeypatch, [0.1] * 4, epochs=4, first_epoch=1)
    assert "no effect: it counts from epoch 2 on" in caplog.text
    assert ended_by(trainer) == "trainer.max_epochs"
