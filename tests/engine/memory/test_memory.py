"""Readings of memory follow what is allocated and freed."""

from __future__ import annotations

import gc
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.engine.memory import memory_log, ram
from src.engine.memory.memory import MIB, DeviceMemory, available_bytes, live_bytes, read_allocator
from src.engine.memory.ram import available_ram, resident_bytes
from tests.conftest import command_environment

CPU, GIB = torch.device("cpu"), 2**30
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
    monkeypatch.setattr(ram, "_mallinfo2", None)  # as _find_mallinfo2 answers with another C library
    assert live_bytes(CPU) is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert ram._find_mallinfo2() is None
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


@linux
def test_the_peak_is_that_since_the_reset():
    memory = DeviceMemory(CPU)
    gc.collect()
    memory.reset_peak()  # gives back what other tests left, gigabytes at times: else that happens while this one measures
    before = memory.held()
    assert memory.peak() == pytest.approx(before, abs=20 * MIB)
    with mmap.mmap(
        -1, 200 * MIB
    ) as pages:  # not a tensor: other tests may have shaped malloc's heap so that it keeps it
        for _ in range(200):
            pages.write(bytes(MIB))
    assert memory.held() == pytest.approx(before, abs=20 * MIB)
    assert memory.peak() - before == pytest.approx(200 * MIB, abs=20 * MIB)
    memory.reset_peak()
    assert memory.peak() - before == pytest.approx(0, abs=20 * MIB)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:  9000000 kB\nMemAvailable:    8388608 kB\n"}


def test_available_memory_of_a_machine(tmp_path):
    files = {"proc/self/cgroup": "0::/\n"}
    assert available_ram(write(tmp_path, MACHINE | files)) == 8 * GIB


def test_available_memory_of_a_job_or_container(tmp_path):
    """cgroup v2: the limit is on the job, above the step that the process is in; cached files are given up."""
    job = {
        "proc/self/cgroup": "0::/slurm/job/step\n",
        "sys/fs/cgroup/slurm/job/step/memory.max": "max\n",
        "sys/fs/cgroup/slurm/job/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/slurm/job/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/slurm/job/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
    }
    assert available_ram(write(tmp_path / "job", MACHINE | job)) == 2 * GIB
    container = {name.replace("/slurm/job/memory", "/memory"): text for name, text in job.items()}
    assert available_ram(write(tmp_path / "container", MACHINE | container)) == 2 * GIB


def test_available_memory_under_cgroup_version_1(tmp_path):
    group = "sys/fs/cgroup/memory/docker/id"
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/id\n0::/\n",
        f"{group}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{group}/memory.usage_in_bytes": f"{3 * GIB}\n",
        f"{group}/memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {GIB // 2}\n",
    }
    assert available_ram(write(tmp_path, MACHINE | files)) == 1.5 * GIB


KEPT = """
import torch
from src.engine.memory import memory_log, ram
ram.keep_freed_memory()
blocks = [torch.ones(2**20) for _ in range(32)]  # 128 MiB in all
full = ram.resident_bytes()
del blocks
kept = ram.resident_bytes()
ram.give_back_freed_memory()
print((full - kept) // 2**20, (full - ram.resident_bytes()) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.35"), reason="glibc's malloc")
@pytest.mark.parametrize(("setting", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_until_it_is_given_back_unless_the_user_has_settings_of_malloc(setting, kept):
    command = [sys.executable, "-c", KEPT]
    done = subprocess.run(command, env=command_environment() | setting, capture_output=True, text=True, check=True)
    freed, given_back = map(int, done.stdout.split())
    assert (freed < 16) == kept
    assert given_back > 112


@pytest.mark.parametrize(
    ("reading", "expected"), [(1e-6, [1, 1, 1, 1, 1, 1]), (5e-5, [1, 0, 0, 1, 0, 0]), (9e-5, [1, 0, 0, 0, 0, 1])]
)
def test_of_quick_steps_only_some_are_measured(monkeypatch, reading, expected):
    """malloc counts for a sixth of a millisecond, a tenth of a head's step on features, and for longer with many threads."""
    clock = [100.0]

    def count(_):
        clock[0] += reading
        return 0

    monkeypatch.setattr(memory_log.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(memory_log, "live_bytes", count)
    meter = memory_log._LiveMeter(CPU)
    measured = []
    for _ in range(6):
        measured.append(bool(meter.begin()))
        assert bool(meter.end_of("forward")) == measured[-1]
        clock[0] += 0.004
    assert measured == expected


def test_a_reading_that_waited_for_a_core_leaves_no_long_gap(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(memory_log.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(memory_log, "live_bytes", lambda _: clock.__setitem__(0, clock[0] + 0.5))
    meter = memory_log._LiveMeter(CPU)
    assert meter.begin()
    clock[0] += 1.1
    assert meter.begin()
