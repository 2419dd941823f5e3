"""Memory that every step keeps is found, and named; a healthy loop is never accused."""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from src.callbacks.freezing import FreezingSchedule
from src.engine.memory.memory import live_bytes
from src.engine.memory.memory_log import MemoryLog
from src.engine.memory_growth import memory_growth
from src.engine.memory_growth.memory_growth import THEN_EVERY, WARM_UP, WINDOW, MemoryGrowth, Rises, size
from src.engine.memory_growth.memory_holders import GRAPH_LIMIT, Holder, find_holders, graph_size
from src.engine.runs.metrics_csv import MetricsCsv
from src.engine.runs.progress import EpochLines, Throughput
from src.models.classifier import Classifier
from src.models.freezing import FreezePlan
from tests.engine.memory import small_runs
from tests.engine.memory.small_runs import classifier, image_data

on_this_machine = pytest.mark.skipif(
    live_bytes(torch.device("cpu")) is None, reason="the C library cannot tell how much is in use"
)
ENOUGH = WARM_UP + WINDOW + 2  # steps of an epoch after which there is a verdict
LARGE = 100  # times what is kept, beside which it does not count what pytest's threads allocate and free meanwhile


def fit(module: L.LightningModule, data: L.LightningDataModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return small_runs.fit(module, data, *callbacks, MemoryGrowth(), **options)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == memory_growth.__name__]


# What is planted, each a mistake that people make


class SumOfLosses(Classifier):
    """Beside it a list that grows as well, but keeps no graph."""

    def on_fit_start(self):
        self.total_loss, self.curve = 0, []

    def mean_loss(self, logits, labels):
        loss = super().mean_loss(logits, labels)
        if self.training:
            self.total_loss += loss
            self.curve.append(loss.detach())
        return loss


class Meter:
    def __init__(self) -> None:
        self.sum = torch.zeros(())


class SumInAMeter(Classifier):
    """In an object of the user's own, in a dict."""

    def on_fit_start(self):
        self.meters = {"train": Meter()}

    def mean_loss(self, logits, labels):
        loss = super().mean_loss(logits, labels)
        if self.training:
            self.meters["train"].sum = self.meters["train"].sum + loss
        return loss


class ListOfLosses(Classifier):
    def on_fit_start(self):
        self.losses = []

    def mean_loss(self, logits, labels):
        loss = super().mean_loss(logits, labels)
        if self.training:
            self.losses.append(loss)
        return loss


class ListOfLogits(Classifier):
    """In a submodule, in a tuple with the number of the batch."""

    def on_fit_start(self):
        self.network.history = []

    def training_step(self, batch, batch_idx):
        self.network.history.append((batch_idx, self(batch[0])))
        return super().training_step(batch, batch_idx)


class Inference(L.Callback):
    """Validates by itself, without no_grad, and keeps what came out."""

    def __init__(self) -> None:
        self.outputs = {"logits": []}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs["logits"].append(pl_module(batch[0]))


@on_this_machine
@pytest.mark.parametrize(
    ("kind", "callbacks", "name"),
    [
        (SumOfLosses, [], "SumOfLosses.total_loss: 1 tensor, 4 B, "),
        (SumInAMeter, [], "SumInAMeter.meters.sum: 1 tensor, 4 B, "),
        (ListOfLosses, [], f"ListOfLosses.losses: {WARM_UP + WINDOW} tensors, "),
        (ListOfLogits, [], f"ListOfLogits.network.history: {WARM_UP + WINDOW} tensors, "),
        (Classifier, [Inference()], f"Inference.outputs: {WARM_UP + WINDOW} tensors, "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_graph_that_grows_is_named_at_once(caplog, kind, callbacks, name):
    counts = []
    counting = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=lambda *_: counts.append(len(warnings(caplog))))
    fit(classifier(kind), image_data(2 * ENOUGH, 1), *callbacks, counting)
    (warning,) = warnings(caplog)
    assert counts.index(1) == WARM_UP + WINDOW
    lines = warning.splitlines()
    assert len(lines) <= 15
    assert lines[0].startswith("Memory grows: every training step keeps ")
    assert lines[0].endswith(" more in RAM.")
    assert "lasts for about " in lines[1]
    (place,) = [line.strip() for line in lines if line.strip().startswith("-")]
    assert place.startswith(f"- {name}")
    operations = [int(part.split(" operations")[0].replace(",", "")) for part in place.split("a graph of ")[1:]]
    assert operations[0] > operations[1] >= WARM_UP  # now, and 20 steps before
    assert "loss.item()" in warning
    assert "loss.detach()" in warning
    assert "torch.no_grad()" in warning
    assert "docs/memory.md" in warning


class KeptOutputs(Classifier):
    def on_fit_start(self):
        self.outputs = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.outputs.append(self(batch[0]).repeat(LARGE, 1))


@on_this_machine
def test_outputs_kept_in_validation(caplog):
    fit(classifier(KeptOutputs), image_data(2, ENOUGH))
    (warning,) = warnings(caplog)
    assert warning.startswith("Memory grows: every validation batch keeps ")
    assert f"KeptOutputs.outputs: {WARM_UP + WINDOW} tensors, " in warning
    assert "outputs.clear()" in warning
    assert "operations" not in warning


@on_this_machine
def test_short_epochs_are_strung_together(caplog):
    """10 steps an epoch, of which 4 rises count."""
    fit(classifier(ListOfLosses), image_data(10, 1), epochs=12)
    (warning,) = warnings(caplog)
    assert "ListOfLosses.losses: " in warning


class Collects(Classifier):
    """Lightning's own way to use all outputs of an epoch: they are dropped when it is over, in one hook or another."""

    def on_fit_start(self):
        self.outputs = []
        self.losses = []

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        self.losses.append(outputs["loss"].detach().repeat(LARGE))
        return outputs

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.outputs.append(self(batch[0]).repeat(LARGE, 1))


class CollectsUntilTheEnd(Collects):
    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.losses.clear()

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        del self.outputs[:-1]


class CollectsUntilTheStart(Collects):
    def on_train_epoch_start(self):
        self.losses = []

    def on_validation_epoch_start(self):
        self.outputs = []


@on_this_machine
@pytest.mark.parametrize("kind", [CollectsUntilTheEnd, CollectsUntilTheStart])
def test_what_is_dropped_when_the_epoch_is_over_is_no_leak(caplog, kind):
    fit(classifier(kind), image_data(ENOUGH, ENOUGH), epochs=2)
    assert warnings(caplog) == []


@on_this_machine
def test_what_is_collected_is_a_leak_where_memory_will_not_last(caplog, monkeypatch):
    monkeypatch.setattr(memory_growth, "available_bytes", lambda kind: 2000)
    fit(classifier(CollectsUntilTheEnd), image_data(2 * ENOUGH, 1))
    (warning,) = warnings(caplog)
    assert "What is free lasts for about " in warning
    assert "CollectsUntilTheEnd.losses: " in warning


LEAK = []


class KeepsInAGlobal(Classifier):
    def mean_loss(self, logits, labels):
        loss = super().mean_loss(logits, labels)
        if self.training:
            LEAK.append(loss)
        return loss


@on_this_machine
def test_a_leak_that_no_attribute_holds_is_reported_too(caplog):
    try:
        fit(classifier(KeepsInAGlobal), image_data(ENOUGH, 1))
    finally:
        LEAK.clear()
    (warning,) = warnings(caplog)
    assert "look at globals and closures" in warning


class SavesInTheBackground(L.Callback):
    """Every few steps another thread writes a copy of the weights."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 7 == 0:
            copy = {name: value.clone() for name, value in pl_module.state_dict().items()}
            path = f"{trainer.default_root_dir}/copy.ckpt"
            threading.Thread(target=torch.save, args=(copy, path)).start()


@on_this_machine
@pytest.mark.parametrize("workers", [0, 2])
def test_no_alarm_in_500_healthy_steps(caplog, tmp_path, monkeypatch, workers):
    """With all that a run has: freezing that changes, checkpoints, logs, loader processes."""
    monkeypatch.chdir(tmp_path)
    looked = []
    monkeypatch.setattr(memory_growth, "_read", lambda kind: looked.append(kind) or READ(kind))
    callbacks = [
        FreezingSchedule(FreezePlan({0: ["head"], 1: ["backbone.1"], 3: ["backbone.0"]}, 4)),
        Throughput(),
        ModelCheckpoint(tmp_path, every_n_train_steps=30),
        SavesInTheBackground(),
        MemoryLog(tmp_path / "memory.csv"),
        EpochLines(),
    ]
    loggers = [MetricsCsv(tmp_path / "metrics.csv")]
    trainer = fit(classifier(), image_data(125, 30, workers), *callbacks, epochs=4, logger=loggers)
    assert trainer.global_step == 500
    assert len(looked) == 4 * (125 - WARM_UP) + 4 * (30 - WARM_UP)
    assert warnings(caplog) == []


READ = memory_growth._read


# The parts


def speed(values: list[int], every: int = 1) -> float | None:
    """Bytes per step of the first window that is full and rises; None if there is none."""
    rises = Rises()
    for index, value in enumerate(values):
        rises.add(index * every, (value, value))
        if len(rises.gains) == WINDOW:
            if (slope := rises.bytes_per_step()) is not None:
                return slope
            rises.gains.clear()
    return None


def sawtooth(period: int, slope: int = 0) -> list[int]:
    return [100 * (index % period) + slope * index for index in range(500)]


def test_only_what_keeps_rising_is_growth():
    noise = [1000 + random.Random(index).choice((-32, 0, 32)) for index in range(500)]
    for healthy in ([1000] * 500, noise, sawtooth(10), sawtooth(15), sawtooth(30), sawtooth(36)):
        assert speed(healthy) is None
    for leak in (
        sawtooth(500),
        sawtooth(15, slope=1000),
        [100 * index - 250 * (index % 20 == 19) for index in range(50)],
    ):
        assert speed(leak) > 0
    assert speed(sawtooth(10, slope=5)) is None  # three falls in 40 steps are too many
    assert speed(list(range(0, 100 * WINDOW, 100))) is None  # one reading too few


def test_bytes_per_step_are_not_moved_by_a_jump():
    """Such as a checkpoint that is being written while the window ends."""
    values = [700 * index + 50_000_000 * (index > 36) for index in range(41)]
    assert speed(values) == 700
    assert speed(values, every=10) == 70


def test_what_lies_between_two_epochs_does_not_count():
    rises = Rises()
    for step, level in enumerate([0, 1, 2, 5000, 5001]):
        if step == 3:
            rises.break_off()
        rises.add(step, (level, level))
    assert [gain for _, gain, _ in rises.gains] == [1, 1, 1]


def test_pieces_of_memory_are_compared_before_their_size():
    """On a GPU: batches of different sizes do not hide a leak, and a tensor that is made longer by cat is one too."""
    rises = Rises()
    for step, reading in enumerate([(5, 900), (6, 100), (6, 150), (6, 120), (5, 500)]):
        rises.add(step, reading)
    assert [rose for _, _, rose in rises.gains] == [True, True, False, False]


def test_after_many_steps_only_some_are_looked_at(monkeypatch):
    read = []
    monkeypatch.setattr(memory_growth, "_read", lambda kind: read.append(kind) or (0, 0))
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), num_training_batches=3000, callbacks=[]
    )
    growth = MemoryGrowth()
    growth.on_train_start(trainer, None)
    for index in range(3000):
        growth.on_train_batch_start(trainer, None, None, index)
    assert len(read) == 1000 - WARM_UP + 2000 // THEN_EVERY


@pytest.mark.parametrize("leaking", ["cuda", "cpu"])
def test_on_a_gpu_both_kinds_of_memory_are_watched(monkeypatch, caplog, leaking):
    """`total_loss += loss` keeps nodes of graphs in RAM and no memory of the GPU. There, batches of two sizes alternate."""
    step = 0

    def level(kind: torch.device) -> int:
        return 10**6 + 1000 * step * (kind.type == leaking) + 1500 * (step % 2) * (kind.type == "cuda")

    def statistics(device: torch.device) -> dict:
        return {
            "allocated_bytes": {"all": {"current": level(device), "peak": 0}},
            "reserved_bytes": {"all": {"current": 0}},
            "allocation": {"all": {"current": 100 + step * (leaking == "cuda")}},
        }

    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", statistics)
    monkeypatch.setattr(memory_growth, "live_bytes", level)
    monkeypatch.setattr(memory_growth, "available_bytes", lambda kind: 10**6 if kind.type == leaking else 0)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0)),
        num_training_batches=100,
        callbacks=[],
        lightning_module=None,
        datamodule=None,
    )
    growth = MemoryGrowth()
    growth.on_train_start(trainer, None)
    for step in range(100):
        growth.on_train_batch_start(trainer, None, None, step)
    (warning,) = warnings(caplog)
    place = {"cuda": "the GPU", "cpu": "RAM"}[leaking]
    assert warning.startswith(f"Memory grows: every training step keeps 1000 B more in {place}.")
    assert "lasts for about 1,000 more" in warning


def test_a_platform_that_cannot_tell_is_not_watched(monkeypatch, caplog):
    caplog.set_level("DEBUG", memory_growth.__name__)
    monkeypatch.setattr(memory_growth, "live_bytes", lambda kind: None)
    fit(classifier(SumOfLosses), image_data(ENOUGH, 1))
    (message,) = warnings(caplog)
    assert "not looked for" in message


def test_holders_have_the_names_a_user_knows():
    leaf = torch.ones(256, requires_grad=True)
    module = classifier()
    module.register_buffer("total", leaf.sum())
    module.network.head.seen = [leaf.detach(), {"deep": (leaf.detach(), deque([leaf * 2]))}]
    callback = Inference()
    callback.meter, callback.module = Meter(), module
    callback.itself = callback
    callback.trainer = SimpleNamespace(kept=torch.zeros(1))
    found = find_holders([module, callback, None])
    assert found["Classifier.total"] == Holder(1, 4, 2)  # sum, and the leaf
    assert found["Classifier.network.head.seen"] == Holder(3, 3 * 1024, 2)
    assert found["Inference.meter.sum"] == Holder(1, 4, 0)
    assert found["Classifier.network.head.weight"] == Holder(1, 16 * 3 * 4, 0)
    assert found["Inference.trainer.kept"].tensors == 1
    assert not [name for name in found if name.startswith(("Inference.module", "Inference.itself"))]


def test_the_trainer_is_not_looked_into():
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.kept = torch.zeros(1)
    callback = Inference()
    callback.trainer = trainer
    assert find_holders([callback]) == {}


def test_looking_keeps_nothing_alive():
    callback = Inference()
    callback.outputs["logits"].append(torch.ones(3, requires_grad=True) * 2)
    gone = weakref.ref(callback.outputs["logits"][0])
    found = find_holders([callback])
    assert found["Inference.outputs"].operations == 2
    callback.outputs["logits"].clear()
    assert gone() is None


def test_what_grew():
    before = Holder(3, 100, 50)
    assert not Holder(3, 100, 50).grew_since(before)
    assert not Holder(2, 90, 40).grew_since(before)
    for grown in (Holder(4, 100, 50), Holder(3, 101, 50), Holder(3, 100, 51)):
        assert grown.grew_since(before)
    assert Holder(1, 4, 0).grew_since(None)
    assert Holder(1, 4, GRAPH_LIMIT).grew_since(Holder(1, 4, GRAPH_LIMIT))


def test_a_deep_graph_is_walked_without_recursion():
    total = torch.zeros((), requires_grad=True)
    for _ in range(30_000):
        total = total + 1
    assert graph_size([total.grad_fn]) == 30_001
    assert graph_size([total.grad_fn, (total * 2).grad_fn]) == 30_002  # what both have is counted once
    assert graph_size([]) == 0


class Endless:
    @property
    def next_functions(self):
        return ((Endless(), 0), (None, 0))


def test_counting_ends_at_the_limit():
    assert graph_size([Endless()], limit=1000) == 1000


def test_a_wide_graph_is_counted_once():
    value = torch.ones((), requires_grad=True)
    for _ in range(60):  # 2 to the power of 60 ways lead to the leaf
        value = value + value
    assert graph_size([value.grad_fn]) == 61


@pytest.mark.parametrize(
    ("count", "text"), [(812, "812 B"), (7382, "7.2 KiB"), (1.25 * 2**20, "1.2 MiB"), (2**40, "1024.0 GiB")]
)
def test_sizes_for_people(count, text):
    assert size(count) == text
