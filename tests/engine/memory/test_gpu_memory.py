"""memory.csv has one whole row per step, whatever happens, and its numbers are those of the phases."""

from __future__ import annotations

import csv
import errno
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from src.engine.memory import memory_log
from src.engine.memory.gpu_driver import DriverReading
from src.engine.memory.memory import live_bytes
from src.engine.memory.memory_log import MemoryLog, batch_size_to_try, continue_csv

MIB = 2**20
PHASES = ("forward", "backward", "optimizer")
LIVE = tuple(f"live_after_{phase}_mib" for phase in PHASES)


def table(path: Path) -> list[dict[str, str]]:
    text = path.read_text()
    assert text.endswith("\n")
    return list(csv.DictReader(text.splitlines()))


class Wide(L.LightningModule):
    """Its forward pass keeps 12 MiB for the backward pass, and its optimizer makes 3 MiB of state in the first step."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight, self.fail_at = torch.nn.Parameter(torch.ones(3 * MIB // 4)), fail_at

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.fail_at:
            raise RuntimeError("no more")
        return sum((self.weight * factor).exp().sum() for factor in (0.1, 0.2, 0.3, 0.4))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9, momentum=0.9)


def fit(
    folder: Path, epochs: int = 2, *, fail_at: int | None = None, save_every: int = 100, resume: Path | None = None
) -> L.Trainer:
    """Four steps an epoch."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[
            MemoryLog(folder / "memory.csv"),
            ModelCheckpoint(folder, "position", every_n_train_steps=save_every),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(TensorDataset(torch.zeros(8, 1), torch.zeros(8)), batch_size=2)
    trainer.fit(Wide(fail_at), batches, ckpt_path=resume, weights_only=True)
    return trainer


@pytest.mark.skipif(live_bytes(torch.device("cpu")) is None, reason="the C library cannot tell how much is in use")
def test_a_row_per_step_and_what_was_alive_in_its_phases(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_log, "REST", 0)
    trainer = fit(tmp_path)
    rows = table(tmp_path / "memory.csv")
    assert [(row["step"], row["epoch"]) for row in rows] == [(str(i + 1), str(i // 4 + 1)) for i in range(8)]
    live, *phases = ([float(row[name]) for row in rows] for name in ("live_mib", *LIVE))
    forward, backward, optimizer = phases
    for step in range(1, 8):
        assert (
            8 < forward[step] - live[step] < 10
        )  # what autograd keeps; Lightning has dropped the last gradients by then
        assert -1 < backward[step] - live[step] < 1  # gone, and there are gradients again
    assert 2 < optimizer[0] - backward[0] < 4  # the optimizer's state
    assert all(abs(optimizer[step] - live[step]) < 1 for step in range(1, 8))
    assert all(float(row["rss_mib"]) > float(row["live_mib"]) for row in rows)

    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert set(logged) == {"memory/live_mib", "memory/rss_mib", "memory/live_after_forward_mib"}
    for name, value in logged.items():  # the largest of the last epoch
        column = [float(row[name.removeprefix("memory/")]) for row in rows[4:]]
        assert value == pytest.approx(max(column), abs=0.01)
    assert next(c for c in trainer.callbacks if isinstance(c, MemoryLog)).peak_mib is None


def test_a_step_that_fails_leaves_the_rows_before_it(tmp_path):
    with pytest.raises(RuntimeError, match="no more"):
        fit(tmp_path, fail_at=6)
    assert [row["step"] for row in table(tmp_path / "memory.csv")] == ["1", "2", "3", "4", "5", "6"]


def test_rows_reach_the_file_before_a_long_epoch_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_log, "ROWS_AT_ONCE", 3)
    at_step = {}

    class Wiser(Wide):
        def on_train_batch_end(self, *args):
            at_step[self.trainer.global_step] = len(table(tmp_path / "memory.csv"))

    monkeypatch.setattr("tests.engine.memory.test_gpu_memory.Wide", Wiser)
    fit(tmp_path)
    assert at_step == {1: 0, 2: 0, 3: 3, 4: 3, 5: 4, 6: 4, 7: 7, 8: 7}
    assert [row["step"] for row in table(tmp_path / "memory.csv")] == [str(i + 1) for i in range(8)]


@pytest.mark.parametrize("saved_after", [4, 6], ids=["at the end of an epoch", "in an epoch"])
def test_a_run_that_continues_has_each_step_once(tmp_path, saved_after):
    with pytest.raises(RuntimeError):
        fit(tmp_path, fail_at=7, save_every=saved_after)
    assert len(table(tmp_path / "memory.csv")) == 7
    fit(tmp_path, 3, resume=tmp_path / "position.ckpt", save_every=100)
    rows = table(tmp_path / "memory.csv")
    assert [row["step"] for row in rows] == [str(i + 1) for i in range(12)]
    assert [row["epoch"] for row in rows] == [str(i // 4 + 1) for i in range(12)]
    fit(tmp_path, 1)  # from the start again
    assert [row["step"] for row in table(tmp_path / "memory.csv")] == ["1", "2", "3", "4"]


def test_a_disk_that_may_only_be_read_by_now_leaves_training(tmp_path, caplog, monkeypatch):
    memory, path = MemoryLog(tmp_path / "memory.csv"), tmp_path / "memory.csv"
    memory._columns = continue_csv(path, ["step", "epoch"], 0)
    memory._rows, memory._filled = np.ones((10, 2)), 10

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("os.truncate", refuse)
    memory._write()
    assert "memory.csv could not be written: Read-only file system" in caplog.text


def test_a_full_disk_leaves_whole_rows_and_training(tmp_path, caplog):
    """A real limit on the size of a file: write() fails half-way, as on a full disk."""
    resource = pytest.importorskip("resource")
    memory, path = MemoryLog(tmp_path / "memory.csv"), tmp_path / "memory.csv"
    memory._columns = continue_csv(path, ["step", "epoch"], 0)
    memory._rows, memory._filled = np.ones((1000, 2)), 1000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1001, before[1]))
    try:
        memory._write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "memory.csv could not be written: File too large" in caplog.text
    assert path.read_text() == "step,epoch\n"


def test_half_a_line_and_another_kind_of_device(tmp_path):
    path = tmp_path / "memory.csv"
    assert continue_csv(path, ["step", "epoch", "a_mib"], 0) == ["step", "epoch", "a_mib"]
    assert path.read_text() == "step,epoch,a_mib\n"
    path.write_text("step,epoch,a_mib\n1,1,5\n2,1,5.5\n10,1,7\n2")
    assert continue_csv(path, ["step", "epoch", "b_mib", "c_mib"], 2) == ["step", "epoch", "a_mib", "b_mib", "c_mib"]
    assert path.read_text() == "step,epoch,a_mib,b_mib,c_mib\n1,1,5,,\n2,1,5.5,,\n"


class FakeGpu:
    """An allocator with a peak, as torch.cuda has one. Sizes are in MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = 0
        self.free = 100
        self.driver = DriverReading()
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", self.statistics)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free * MIB, 1000 * MIB))
        monkeypatch.setattr(memory_log, "Driver", lambda device: SimpleNamespace(read=lambda: self.driver))

    def use(self, peak: int, left: int) -> None:
        """Work that needs `peak` MiB and leaves `left` allocated."""
        self.peak, self.allocated = max(self.peak, peak), left

    def reset(self, device: torch.device) -> None:
        self.peak = self.allocated

    def statistics(self, device: torch.device) -> dict:
        assert device == torch.device("cuda", 0)
        return {
            "allocated_bytes": {"all": {"current": self.allocated * MIB, "peak": self.peak * MIB}},
            "reserved_bytes": {"all": {"current": 200 * MIB}},
            "allocation": {"all": {"current": 17}},
        }


class Run:
    """Calls the hooks as Lightning does, for one epoch, with a batch of 8."""

    def __init__(self, log: MemoryLog, steps: int, world_size: int = 1) -> None:
        self.log, self.logged = log, {}
        self.trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cuda", 0)),
            is_global_zero=True,
            global_step=0,
            current_epoch=0,
            num_training_batches=steps,
            global_rank=0,
            world_size=world_size,
        )
        self.module = SimpleNamespace(log_dict=lambda values, **_: self.logged.update(values))
        log.on_train_start(self.trainer, self.module)

    def step(self, gpu: FakeGpu, *parts: tuple[int, int], optimizer: int, left: int) -> None:
        """parts: what forward and backward need, once for every part of the batch."""
        batch = (None, [0] * 8)
        self.log.on_train_batch_start(self.trainer, self.module, batch, 0)
        for forward, backward in parts:
            gpu.use(forward, forward)
            self.log.on_before_backward(self.trainer, self.module, None)
            gpu.use(backward, left)
            self.log.on_after_backward(self.trainer, self.module)
        gpu.use(optimizer, left)
        self.trainer.global_step += 1
        self.log.on_train_batch_end(self.trainer, self.module, None, batch, 0)

    def end_epoch(self) -> None:
        self.log.on_train_epoch_end(self.trainer, self.module)
        self.trainer.current_epoch += 1
        self.log.on_train_epoch_start(self.trainer, self.module)


def test_peaks_of_the_phases_of_a_gpu(tmp_path, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    run = Run(MemoryLog(tmp_path / "memory.csv"), steps=3)
    gpu.use(50, 10)
    run.step(gpu, (30, 40), optimizer=25, left=20)
    gpu.use(500, 20)  # between two steps: a validation
    gpu.driver = DriverReading(used=300 * MIB, utilisation=80, other_processes=7 * MIB)
    run.step(gpu, (35, 60), (45, 55), optimizer=20, left=20)
    gpu.driver = DriverReading(used=300 * MIB, utilisation=40)
    run.step(gpu, (35, 36), optimizer=70, left=20)
    run.end_epoch()

    rows = table(tmp_path / "memory.csv")
    peaks = [tuple(row[f"{phase}_peak_mib"] for phase in PHASES) for row in rows]
    assert peaks == [("30", "40", "25"), ("45", "60", "20"), ("35", "36", "70")]
    assert [row["peak_mib"] for row in rows] == ["40", "60", "70"]
    assert [row["allocated_mib"] for row in rows] == ["10", "20", "20"]
    assert {(row["reserved_mib"], row["live_allocations"]) for row in rows} == {("200", "17")}
    device = ("device_used_mib", "device_utilisation_percent", "other_processes_mib")
    assert [tuple(row[name] for name in device) for row in rows] == [
        ("", "", ""),
        ("300", "80", "7"),
        ("300", "40", ""),
    ]
    assert {name.removeprefix("memory/"): float(value) for name, value in run.logged.items()} == {
        "allocated_mib": 20,
        "reserved_mib": 200,
        "peak_mib": 70,
        "forward_peak_mib": 45,
        "backward_peak_mib": 60,
        "optimizer_peak_mib": 70,
        "device_utilisation_percent": 60,
    }
    assert run.log.peak_mib == 500
    gpu.use(600, 20)  # a validation after the last step
    assert run.log.peak_mib == 600


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_larger_batch_is_suggested_once_when_everything_trains(tmp_path, monkeypatch, caplog, world_size):
    caplog.set_level("INFO")
    gpu = FakeGpu(monkeypatch)
    gpu.free = 800  # and 200 in the cache
    run = Run(MemoryLog(tmp_path / "memory.csv", everything_trains_from=1), steps=200, world_size=world_size)
    gpu.use(100, 100)
    for epoch, peak in enumerate((110, 200, 200)):
        for _ in range(200):
            run.step(gpu, (peak, 150), optimizer=100, left=100)
        run.end_epoch()
        assert len(caplog.messages) == (epoch >= 1)
    assert "200 of the 1000 MiB" in caplog.text
    assert f"data.batch_size={32 * world_size} " in caplog.text  # 12.5 MiB an image: 60 would fit into 850


def test_no_batch_is_suggested_that_leaves_few_steps(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    gpu = FakeGpu(monkeypatch)
    gpu.free = 800
    run = Run(MemoryLog(tmp_path / "memory.csv"), steps=39)
    gpu.use(100, 100)
    for _ in range(39):
        run.step(gpu, (200, 150), optimizer=100, left=100)
    run.end_epoch()
    assert not caplog.messages


@pytest.mark.parametrize(
    ("batch", "fixed", "peak", "total", "expected"),
    [
        (32, 1000, 2000, 10_000, 128),  # 31.25 MiB an image; 240 would fit
        (32, 1000, 5900, 10_000, None),  # 48 would fit
        (24, 1000, 5900, 10_000, 32),  # 36 would
        (48, 1000, 4000, 10_000, 64),  # 120 would
        (31, 1000, 6000, 10_000, None),  # 60 % are used, though 32 would fit
        (32, 8, 10, 80_000, 1_048_576),  # 1,087,871 would
        (1, 1000, 2000, 24_000, 16),  # 19 would
    ],
)
def test_the_batch_size_to_try(batch, fixed, peak, total, expected):
    assert batch_size_to_try(batch, fixed, peak, total) == expected
    if expected is not None:
        per_image = (peak - fixed) / batch
        assert fixed + expected * per_image <= 0.85 * total < fixed + 2 * expected * per_image


def test_a_run_that_had_nothing_left_to_train_has_no_peak(tmp_path):
    assert MemoryLog(tmp_path / "memory.csv").peak_mib is None
