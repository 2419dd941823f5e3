"""The position is saved when it is asked for, is the last step's, and a signal ends training with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace

import lightning as L
import pytest

from src.engine.runs import position as module
from src.engine.runs import writing
from src.engine.runs.checkpoint_selection import WeightAverage
from src.engine.runs.errors import Terminated
from src.engine.runs.position import PositionCheckpoint, StopOnSignal
from src.engine.runs.reading import read_checkpoint
from src.engine.runs.writing import DurableCheckpointIO
from tests.engine.runs.small_training import classifier, fit, freezing


class At(L.Callback):
    """Does something at the end of a training step (counted from 1), or of the first validation batch after it."""

    def __init__(self, step, work, validation=False):
        self.step, self.work, self.validation = step, work, validation

    def on_train_batch_end(self, trainer, *arguments):
        if not self.validation and trainer.global_step == self.step:
            self.work()

    def on_validation_batch_end(self, trainer, *arguments):
        if self.validation and trainer.global_step == self.step:
            self.validation = False  # the other batches are not to do it again
            self.work()


def saved_steps(monkeypatch, folder, epochs=2, **when):
    """The steps after which last.ckpt was written."""
    steps = []
    position = PositionCheckpoint(folder, **when)
    monkeypatch.setattr(L.Trainer, "save_checkpoint", lambda trainer, path: steps.append(trainer.global_step))
    fit(classifier(), epochs, position)
    return steps


def test_without_more_words_every_epoch_is_saved(monkeypatch, tmp_path):
    assert saved_steps(monkeypatch, tmp_path) == [4, 8]


def test_every_n_steps_but_not_between_an_epoch_and_its_validation(monkeypatch, tmp_path):
    assert saved_steps(monkeypatch, tmp_path, every_n_steps=2) == [2, 4, 6, 8]


def test_every_n_minutes(monkeypatch, tmp_path):
    """A clock that goes on by 20 seconds at every look."""
    seconds = iter(range(0, 10_000, 20))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))  # others look at theirs
    assert saved_steps(monkeypatch, tmp_path, every_n_minutes=1) == [3, 4, 7, 8]


def train(folder, *callbacks, resume=None, average=True):
    """Five epochs of four steps; returns (weights, average) as lists of tensors."""
    position = PositionCheckpoint(folder)
    model, mean = classifier(), WeightAverage(0.9)
    extra = [*callbacks, freezing(preset="gradual"), mean, position, StopOnSignal(position)]
    fit(model, 5, *extra, resume=resume, plugins=[DurableCheckpointIO()])
    return [*model.state_dict().values(), *mean.weights().values()]


@pytest.mark.parametrize(
    ("step", "validation", "saved"),
    [(1, False, 1), (6, False, 6), (8, False, 8), (8, True, 8), (20, True, 20)],
    ids=["first step", "amid an epoch", "last step of an epoch", "in validation", "in the last validation"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_with_the_position_and_it_goes_on_exactly(tmp_path, number, step, validation, saved):
    undisturbed = train(tmp_path / "undisturbed")
    before = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    kill = At(step, lambda: os.kill(os.getpid(), number), validation)
    with pytest.raises(Terminated if number == signal.SIGTERM else (KeyboardInterrupt, SystemExit)):
        train(tmp_path, kill)
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == before
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == saved
    continued = train(tmp_path, resume=tmp_path / "last.ckpt")
    assert all(one.equal(other) for one, other in zip(undisturbed, continued, strict=True))


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(tmp_path, At(3, twice))
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("again", [False, True])
def test_a_step_that_never_ends_is_ended(tmp_path, monkeypatch, number, again):
    """By the second signal, or once it takes far longer than the steps before. What was saved before stays."""
    monkeypatch.setattr(module, "LEAST_SECONDS", 100.0 if again else 1.2)

    def hang():
        os.kill(os.getpid(), number)
        if again:
            threading.Timer(1.2, os.kill, [os.getpid(), number]).start()
        time.sleep(30)

    start = time.monotonic()
    with pytest.raises((KeyboardInterrupt, SystemExit) if number == signal.SIGINT else Terminated):
        train(tmp_path, At(6, hang))
    assert time.monotonic() - start < 15
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4


def test_lightnings_handlers_are_never_there(tmp_path):
    """They wait for the other processes within the handler, and a SIGTERM that came before ours were there was lost."""

    seen = []

    class Handlers(L.Callback):
        def on_train_start(self, trainer, *arguments):
            seen.append(signal.getsignal(signal.SIGTERM))

    fit(classifier(), 1, Handlers(), StopOnSignal(PositionCheckpoint(tmp_path)), plugins=[DurableCheckpointIO()])
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_end_a_save_that_is_under_way(tmp_path, monkeypatch, caplog, number):
    """The thread writes slowly, and the signal comes again meanwhile. What is said to be saved is saved."""
    caplog.set_level("INFO")
    write = writing.write_atomically

    def slowly(path, *arguments, **keywords):
        if stopping.is_set():
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        assert "the position is in" not in caplog.text
        write(path, *arguments, **keywords)

    def stop():
        os.kill(os.getpid(), number)
        stopping.set()

    stopping = threading.Event()
    monkeypatch.setattr(writing, "write_atomically", slowly)
    with pytest.raises(Terminated if number == signal.SIGTERM else (KeyboardInterrupt, SystemExit)):
        train(tmp_path, At(6, stop))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 6
    assert f"stopped at step 6; the position is in {tmp_path / 'last.ckpt'}" in caplog.text


def test_a_signal_after_the_last_step_waits_for_the_last_position(tmp_path, monkeypatch):
    write = writing.write_atomically

    def slowly(path, *arguments, **keywords):
        if trained.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        write(path, *arguments, **keywords)

    trained = threading.Event()
    monkeypatch.setattr(writing, "write_atomically", slowly)
    with pytest.raises(Terminated):
        train(tmp_path, At(20, trained.set))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 20


def test_a_position_that_the_disk_did_not_take_is_not_said_to_be_saved(tmp_path, caplog):
    """A real limit on the size of a file, and a signal."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_and_stop():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(Terminated):
            train(tmp_path, At(6, fill_and_stop))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "stopped at step 6, whose position could not be written" in caplog.text
    assert "the position is in" not in caplog.text
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4
