"""Readings of memory follow what is allocated and freed; the driver is asked about the right GPU, and seldom."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from types import SimpleNamespace

import pynvml
import pytest
import torch

from src import memory
from src.memory import Driver, DriverReading, available_bytes, live_bytes, read_allocator, resident_bytes

CPU, MIB = torch.device("cpu"), 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the C library tells only on Linux")


@linux
@pytest.mark.parametrize(("count", "side"), [(1, 2000), (2000, 30)], ids=["one large tensor", "many small tensors"])
def test_live_bytes_follow_tensors(count, side):
    gc.collect()  # what other tests left
    before = live_bytes(CPU)
    tensors = [torch.zeros(side, side) for _ in range(count)]
    wanted = count * side * side * 4
    assert wanted <= live_bytes(CPU) - before <= 1.3 * wanted
    del tensors
    assert abs(live_bytes(CPU) - before) < 0.1 * wanted


@linux
def test_resident_bytes_are_those_in_use_now():
    before = resident_bytes()
    with mmap.mmap(-1, 64 * MIB) as pages:
        for start in range(
            0, 64 * MIB, mmap.PAGESIZE
        ):  # touched in place: a copy of 64 MiB may stay with the allocator
            pages[start] = 1
        assert resident_bytes() - before > 60 * MIB
    assert resident_bytes() - before < 20 * MIB


@linux
def test_what_is_available_on_a_cpu():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes(CPU) < total


def test_platforms_that_cannot_tell(monkeypatch):
    monkeypatch.setattr(memory, "_mallinfo2", None)  # as _find_mallinfo2 answers with another C library
    assert live_bytes(CPU) is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory._find_mallinfo2() is None
    assert available_bytes(CPU) is None
    monkeypatch.setitem(sys.modules, "resource", None)
    assert resident_bytes() is None


def test_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 5)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 30)
    assert (live_bytes(torch.device("mps")), available_bytes(torch.device("mps"))) == (5, 70)


def test_the_allocator_of_a_gpu(monkeypatch):
    """What the cache holds is available too."""
    device = torch.device("cuda", 1)
    statistics = {
        "allocated_bytes": {"all": {"current": 60, "peak": 90}},
        "reserved_bytes": {"all": {"current": 100, "peak": 110}},
        "allocation": {"all": {"current": 7, "peak": 9}},
    }
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", {device: statistics}.get)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {device: (1000, 2000)}.get)
    assert read_allocator(device) == (60, 100, 90, 7)
    assert live_bytes(device) == 60
    assert available_bytes(device) == 1040


class FakeDriver:
    """Answers for GPUs by UUID, as NVML does, and counts the questions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, handles: dict[str, object], uuid: str) -> None:
        self.handles, self.questions, self.now = handles, 0, 100.0
        self.processes = [(os.getpid(), 300 * MIB), (1, 40 * MIB), (2, 2 * MIB)]
        self.utilisation: int | None = 87
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
        monkeypatch.setattr(memory.time, "monotonic", lambda: self.now)
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
