"""What only a GPU shows about memory: pytest -m gpu tests/gpu/test_gpu_memory_on_gpu.py."""

from __future__ import annotations

import pynvml
import pytest
import torch

from src.engine.memory.gpu_driver import Driver
from src.engine.memory.memory import available_bytes, read_allocator
from src.engine.memory.memory_log import MemoryLog
from tests.engine.memory.small_runs import classifier, fit, image_data
from tests.engine.memory.test_gpu_memory import PHASES, table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MIB = 2**20
DEVICE = torch.device("cuda", 0)


def test_the_allocators_counters():
    torch.zeros(1, device=DEVICE)
    before = read_allocator(DEVICE)
    tensor = torch.zeros(64 * MIB, dtype=torch.uint8, device=DEVICE)
    during = read_allocator(DEVICE)
    del tensor
    after = read_allocator(DEVICE)
    assert during.allocated - before.allocated == 64 * MIB
    assert during.allocations - before.allocations == 1
    assert after[:1] + after[3:] == before[:1] + before[3:]
    assert after.peak >= during.allocated
    torch.cuda.reset_peak_memory_stats(DEVICE)
    assert read_allocator(DEVICE).peak == after.allocated
    assert available_bytes(DEVICE) >= after.reserved - after.allocated


def test_the_driver_speaks_of_the_same_gpu():
    driver = Driver(DEVICE)
    reading = driver.read()
    assert pynvml.nvmlDeviceGetUUID(driver._handle).endswith(str(torch.cuda.get_device_properties(DEVICE).uuid))
    assert reading.used >= read_allocator(DEVICE).reserved
    assert reading.utilisation is None or 0 <= reading.utilisation <= 100
    assert reading.other_processes is None or 0 <= reading.other_processes <= reading.used
    assert driver.read() is reading


def test_memory_csv_of_a_gpu(tmp_path):
    trainer = fit(classifier(), image_data(20, 2), MemoryLog(tmp_path / "memory.csv"), epochs=2, accelerator="gpu")
    rows = [{name: float(value) for name, value in row.items() if value} for row in table(tmp_path / "memory.csv")]
    assert [row["step"] for row in rows] == list(range(1, 41))
    for row in rows:
        peaks = [row[f"{phase}_peak_mib"] for phase in PHASES]
        assert row["peak_mib"] == max(peaks)
        assert 0 < row["allocated_mib"] <= min(peaks)
        assert row["peak_mib"] <= row["reserved_mib"] <= row["device_used_mib"]
    assert len({row["live_allocations"] for row in rows[1:20]}) == 1
    assert trainer.callback_metrics["memory/peak_mib"] == pytest.approx(max(row["peak_mib"] for row in rows[20:]), 0.01)
    log = next(callback for callback in trainer.callbacks if isinstance(callback, MemoryLog))
    assert log.peak_mib >= int(max(row["peak_mib"] for row in rows))
