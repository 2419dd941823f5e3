"""metrics.csv goes on where the interrupted run stopped."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint

from src.engine.memory.memory_log import MemoryLog, continue_csv
from src.engine.runs.files import read_metrics
from src.engine.runs.metrics_csv import EpochRow, MetricsCsv
from src.engine.runs.position import PositionCheckpoint
from src.engine.runs.progress import Throughput
from src.engine.runs.writing import DurableCheckpointIO
from src.engine.steps.metrics import SplitMetrics
from src.tasks.multiclass import Multiclass
from tests.engine.runs.small_training import classifier, fit


def test_validation_and_training_of_an_epoch_are_one_row(tmp_path):
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"val/loss": 0.5, "epoch": 0}, step=9)
    logger.log_metrics({"train/loss": 0.25, "epoch": 0}, step=9)
    logger.log_metrics({"val/loss": 0.4, "new": 3.0, "epoch": 1}, step=19)
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"epoch": 1, "step": 10, "train/loss": 0.25, "val/loss": 0.5},
        {"epoch": 2, "step": 20, "val/loss": 0.4, "new": 3.0},
    ]


def test_a_continued_run_keeps_its_rows_and_overwrites_the_repeated_ones(tmp_path):
    first = MetricsCsv(tmp_path / "metrics.csv")
    first.log_metrics({"val/loss": 0.5, "epoch": 0}, step=9)
    first.log_metrics({"val/loss": 0.4, "epoch": 1}, step=19)
    second = MetricsCsv(tmp_path / "metrics.csv")
    second.log_metrics({"val/loss": 0.4, "epoch": 1}, step=19)
    second.log_metrics({"val/loss": 0.3, "epoch": 2}, step=29)
    assert [row["val/loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [0.5, 0.4, 0.3]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_file_that_a_spreadsheet_saved_in_another_way_is_kept_and_begun_anew(tmp_path, caplog, separator):
    file, changed = tmp_path / "metrics.csv", tmp_path / "metrics.changed.csv"
    logger = MetricsCsv(file)
    logger.log_metrics({"val/loss": 0.5, "epoch": 0}, step=9)
    logger.log_metrics({"own": 1.0}, step=14)  # of somebody's callback, without an epoch
    file.write_text("\ufeff" + file.read_text().replace(",", separator).replace("\n", "\r\n"), encoding="utf-8")
    MetricsCsv(file).log_metrics({"val/loss": 0.4, "epoch": 1}, step=19)
    losses = [row["val/loss"] for row in read_metrics(file) if "val/loss" in row]
    assert losses == ([0.5, 0.4] if separator == "," else [0.4])
    assert changed.exists() == ("is kept as metrics.changed.csv" in caplog.text) == (separator != ",")
    memory = tmp_path / "memory.csv"
    memory.write_text("step;epoch;live_mib\n1;1;5,5\n")
    assert continue_csv(memory, ["step", "epoch"], 1) == ["step", "epoch"]


class Killed(Exception):
    pass


class KillAtStep(L.Callback):
    """Before the first step that is not in the position, as a kill: nothing else is called."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *arguments):
        if trainer.global_step == self.step:
            raise Killed


class KillAfterTheEpochsSave(Checkpoint):
    def on_train_epoch_end(self, trainer, module):
        raise Killed


def train(folder, *callbacks, resume=None):
    """Two epochs of four steps. Returns metrics.csv without what is measured with a clock."""
    folder.mkdir(exist_ok=True)
    row = EpochRow(MetricsCsv(folder / "metrics.csv"))
    memory = MemoryLog(folder / "memory.csv")
    memory.on_exception = lambda *arguments: None  # a process that is killed writes nothing
    callbacks = [Throughput(), memory, row, PositionCheckpoint(folder, 1), *callbacks]
    fit(classifier(2), 2, *callbacks, resume=resume, plugins=[DurableCheckpointIO(background=False)])
    rows = read_metrics(folder / "metrics.csv")
    assert all(len(row) == len(rows[0]) and row["images_per_second"] > 0 for row in rows)
    return [{name: value for name, value in row.items() if not name.startswith(("memory", "images"))} for row in rows]


@pytest.mark.parametrize("kill", [*map(KillAtStep, (1, 3, 5, 7)), KillAfterTheEpochsSave()])
def test_a_run_that_was_killed_has_the_rows_of_an_undisturbed_one(tmp_path, kill):
    undisturbed = train(tmp_path / "whole")
    assert len(undisturbed) == 2
    assert undisturbed[1].keys() >= {"epoch", "step", "train/loss", "train/acc", "val/loss", "lr/head"}
    with pytest.raises(Killed):
        train(tmp_path, kill)
    assert train(tmp_path, resume=tmp_path / "last.ckpt") == undisturbed
    steps = [line.partition(",")[0] for line in (tmp_path / "memory.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(1, 9)]


@pytest.mark.parametrize("world", [2, 3, 1])
def test_the_sums_of_several_processes_go_on_in_as_many_or_in_the_first(world):
    generator = torch.Generator().manual_seed(0)

    def update(metrics):
        labels, logits = torch.randint(0, 5, (7,), generator=generator), torch.rand(7, 5, generator=generator)
        metrics.update(torch.rand((), generator=generator), logits, labels, 7)

    before = [SplitMetrics(Multiclass(), "abcde"), SplitMetrics(Multiclass(), "abcde")]
    for metrics in before * 3:
        update(metrics)
    sums = {name: torch.stack([metrics.sums()[name] for metrics in before]) for name in before[0].sums()}
    after = [SplitMetrics(Multiclass(), "abcde") for _ in range(world)]
    for rank, metrics in enumerate(after):
        metrics.resume(sums, rank, world)
    if world == 2:
        assert all(
            one.sums()[name].equal(other.sums()[name])
            for one, other in zip(before, after, strict=True)
            for name in sums
        )
    assert sum(metrics.asking[""].metric.classes for metrics in after).equal(sums["classes"].sum(0).int())
    total = sum(metrics.sums()["loss"].double().sum(0) for metrics in after)
    assert torch.allclose(total, sums["loss"].double().sum((0, 1)), rtol=1e-12)
