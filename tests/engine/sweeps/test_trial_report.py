"""A trial's run reports every epoch, ends as it is told, and goes on later as if nothing had happened."""

from __future__ import annotations

import itertools
import math
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from lightning import Trainer

from src.config import Checkpoint
from src.engine.runs.errors import Terminated
from src.engine.runs.position import PositionCheckpoint, StopOnSignal
from src.engine.runs.reading import read_checkpoint
from src.engine.runs.writing import DurableCheckpointIO
from src.engine.sweeps import feature, trial_report
from src.engine.sweeps.trial import FINISH, GO_ON, INTERRUPT, ReportingProcess, Trial, working_on
from src.engine.sweeps.trial_report import TrialReport
from src.trainer import checkpoint_callbacks
from tests.engine.runs.small_training import classifier, fit, freezing
from tests.engine.runs.test_position import At


class Sweep:
    """The worker: a thread that answers the reports of a trial; the answers by epoch, else GO_ON."""

    def __init__(self, answers=None, keeps_checkpoints=False, look=lambda: None):
        self.trial = Trial(keeps_checkpoints)
        self.answers, self.look = answers or {}, look
        self.rows, self.looked = [], []

    def __enter__(self):
        self.thread = threading.Thread(target=self.work)
        self.thread.start()
        return self

    def work(self):
        while row := self.trial.next_row(30):
            self.rows.append(row)
            self.looked.append(self.look())
            self.trial.answer(self.answers.get(row["epoch"], GO_ON))

    def __exit__(self, *error):
        self.trial.over()
        self.thread.join()


def train(folder, trial, *callbacks, epochs=5, resume=None, storage=None):
    """Returns (trainer, weights)."""
    position = PositionCheckpoint(folder)
    stop = StopOnSignal(position)
    last = [position, stop, TrialReport(trial)] if trial else [position, stop]
    model = classifier()
    everything = [*callbacks, freezing(preset="gradual"), *last]
    trainer = fit(model, epochs, *everything, resume=resume, plugins=[storage or DurableCheckpointIO()])
    return trainer, list(model.state_dict().values())


def test_every_epoch_is_reported_with_its_numbers(tmp_path):
    with Sweep() as sweep:
        trainer, _ = train(tmp_path, sweep.trial, epochs=2)
    assert [row["epoch"] for row in sweep.rows] == [1, 2]
    for row in sweep.rows:
        assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= row.keys()
        assert all(type(value) in (int, float) and math.isfinite(value) for value in row.values())
    assert sweep.rows[0]["train/loss"] != sweep.rows[1]["train/loss"]
    assert sweep.rows[1] == {name: float(value) for name, value in trainer.callback_metrics.items()} | {"epoch": 2}


def test_a_run_that_is_to_finish_ends_as_after_its_last_epoch(tmp_path):
    with Sweep({2: FINISH}) as sweep:
        trainer, _ = train(tmp_path, sweep.trial)
    assert [row["epoch"] for row in sweep.rows] == [1, 2]
    assert (trainer.current_epoch, trainer.global_step) == (2, 8)
    assert trainer.state.finished
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 8


@pytest.mark.parametrize(("saved", "steps"), [(2, 8), (1, 8)], ids=["its last epoch is saved", "one epoch is lost"])
def test_a_run_that_was_ended_when_the_sweep_was_killed_ends_after_the_same_epoch(tmp_path, saved, steps):
    with Sweep({saved: INTERRUPT}) as sweep, pytest.raises(Terminated):
        train(tmp_path, sweep.trial)
    trial = Trial(finish_after=2)
    trial.answer(FINISH)  # as its worker does
    trainer, _ = train(tmp_path, trial, resume=tmp_path / "last.ckpt")
    assert (trainer.current_epoch, trainer.global_step) == (2, steps)
    assert trainer.state.finished


def check_goes_on(folder, undisturbed):
    with Sweep() as sweep:
        _, weights = train(folder, sweep.trial, resume=folder / "last.ckpt")
    assert all(one.equal(other) for one, other in zip(undisturbed, weights, strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights of a run that is no trial."""
    return train(tmp_path_factory.mktemp("undisturbed"), None)[1]


@pytest.mark.parametrize("epoch", [2, 5])
def test_a_run_that_is_interrupted_at_an_epoch_goes_on_exactly(tmp_path, undisturbed, epoch):
    with Sweep({epoch: INTERRUPT}) as sweep, pytest.raises(Terminated):
        train(tmp_path, sweep.trial)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4 * epoch
    check_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("step", "validation", "saved"),
    [(5, False, 6), (8, False, 8), (8, True, 8)],
    ids=["amid an epoch", "last step of an epoch", "in validation"],
)
def test_a_run_that_is_interrupted_between_reports_goes_on_exactly(tmp_path, undisturbed, step, validation, saved):
    with Sweep() as sweep, pytest.raises(Terminated):
        train(tmp_path, sweep.trial, At(step, lambda: sweep.trial.answer(INTERRUPT), validation))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == saved
    check_goes_on(tmp_path, undisturbed)


class SlowDisk(DurableCheckpointIO):
    def _write(self, path, checkpoint):
        time.sleep(0.1)
        super()._write(path, checkpoint)


def test_checkpoints_that_are_to_be_copied_are_there_when_the_epoch_is_reported(tmp_path):
    """Although they are written in the background."""
    path = tmp_path / "last.ckpt"

    def look():
        return path.exists() and read_checkpoint(path)["global_step"]

    with Sweep(keeps_checkpoints=True, look=look) as sweep:
        train(tmp_path, sweep.trial, epochs=3, storage=SlowDisk())
    assert sweep.looked == [4, 8, 12]


def test_an_epoch_is_reported_after_all_else_of_it(tmp_path):
    """Of CheckpointCallbacks the order is that of the list."""
    with working_on(Trial()):
        assert [type(callback) for callback in feature.callbacks(None, None)] == [TrialReport]
    assert feature.callbacks(None, None) == []
    trainer = Trainer(callbacks=[*checkpoint_callbacks(Checkpoint(), tmp_path), TrialReport(Trial())], logger=False)
    assert isinstance(trainer.callbacks[-1], TrialReport)


def report(trial, broadcast, first: bool):
    """One report of a process among several."""
    strategy = SimpleNamespace(broadcast=broadcast)
    metrics = {"val/acc": 0.5}
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=first, callback_metrics=metrics, current_epoch=0)
    TrialReport(trial).on_train_epoch_end(trainer, None)
    return trainer


def test_while_the_sweep_is_slow_to_answer_the_other_processes_hear_of_the_first(monkeypatch):
    """They give up after strategy.timeout_seconds, which a driver may take."""
    monkeypatch.setattr(trial_report, "BEAT_SECONDS", 0.1)
    said = []

    def broadcast(answer):
        said.append((time.monotonic(), answer))
        return answer

    trial = Trial()
    threading.Timer(1.0, trial.answer, args=[FINISH]).start()
    assert report(trial, broadcast, first=True).should_stop
    times = [when for when, _ in said]
    assert [answer for _, answer in said] == [""] * (len(said) - 1) + [FINISH]
    assert len(said) > 4
    assert max(after - before for before, after in itertools.pairwise(times)) < 0.6

    heard = iter(["", "", FINISH])
    assert report(trial, lambda answer: next(heard), first=False).should_stop


def test_a_trial_whose_worker_is_gone_saves_its_position(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # where nobody listens any more
        monkeypatch.setenv("TRIAL_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("TRIAL_TOKEN", "x")
    io = SimpleNamespace(wait=lambda: None)
    strategy = SimpleNamespace(broadcast=lambda answer: answer, checkpoint_io=io)
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=True, callback_metrics={}, current_epoch=0)
    stop = SimpleNamespace(received=0)
    report = TrialReport(ReportingProcess())
    report.stop = stop
    report.on_train_epoch_end(trainer, None)
    assert stop.received == signal.SIGTERM
