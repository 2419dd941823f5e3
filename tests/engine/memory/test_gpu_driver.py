"""The driver is asked about the right GPU, and seldom."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pynvml
import pytest
import torch

from src.engine.memory import gpu_driver
from src.engine.memory.gpu_driver import Driver, DriverReading

MIB = 2**20


class FakeDriver:
    """Answers for GPUs by UUID, as NVML does, and counts the questions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, handles: dict[str, object], uuid: str) -> None:
        self.handles, self.questions, self.now = handles, 0, 100.0
        self.processes = [(os.getpid(), 300 * MIB), (1, 40 * MIB), (2, 2 * MIB)]
        self.utilisation: int | None = 87
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
        monkeypatch.setattr(gpu_driver.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", self.handle)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", self.memory)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", self.rates)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", self.running)

    def handle(self, uuid: str) -> object:
        if uuid not in self.handles:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self.handles[uuid]

    def memory(self, handle: object) -> SimpleNamespace:
        assert handle == "ours"
        self.questions += 1
        return SimpleNamespace(used=500 * MIB)

    def rates(self, handle: object) -> SimpleNamespace:
        if self.utilisation is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=self.utilisation)

    def running(self, handle: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]


@pytest.mark.parametrize("kind", ["GPU", "MIG"])
def test_the_driver_is_asked_about_our_gpu_once_a_second(monkeypatch, kind):
    fake = FakeDriver(monkeypatch, {"GPU-other": "other", f"{kind}-12-ab": "ours"}, uuid="12-ab")
    driver = Driver(torch.device("cuda", 0))
    first = driver.read()
    assert first == DriverReading(used=500 * MIB, utilisation=87, other_processes=42 * MIB)
    fake.utilisation = 5
    fake.now += 0.9
    assert driver.read() is first
    assert fake.questions == 1
    fake.now += 0.2
    assert driver.read().utilisation == 5
    assert fake.questions == 2


def test_what_a_driver_does_not_tell_is_none(monkeypatch):
    """In a container this process is not in the driver's list, on Windows its memory is not known, MIG has no rates."""
    fake = FakeDriver(monkeypatch, {"GPU-x": "ours"}, uuid="x")
    fake.utilisation = None
    fake.processes = [(-1, 300 * MIB), (-2, 40 * MIB)]
    assert Driver(torch.device("cuda")).read() == DriverReading(used=500 * MIB)
    fake.processes = [(os.getpid(), None), (1, 40 * MIB)]
    assert Driver(torch.device("cuda")).read().other_processes is None


def test_without_a_driver_it_is_said_once(monkeypatch, caplog):
    FakeDriver(monkeypatch, {}, uuid="x")
    caplog.set_level("INFO")
    driver = Driver(torch.device("cuda"))
    assert [driver.read(), driver.read()] == [DriverReading()] * 2
    assert caplog.text.count("utilisation and other processes of the GPU are not known") == 1
