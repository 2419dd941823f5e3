"""The peak of a CPU's memory, and how much of it a process can still get."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from src.device_memory import MIB, CpuMemory, available_memory, memory_of
from src.errors import UserError

GIB = 2**30
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="no /proc")


@needs_linux
def test_the_peak_is_that_since_the_reset():
    memory = CpuMemory()
    gc.collect()
    memory.reset_peak()  # gives back what other tests left, gigabytes at times: else that happens while this one measures
    before = memory.held()
    assert memory.peak() == pytest.approx(before, abs=20 * MIB)
    torch.ones(200 * MIB // 4)
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
    assert available_memory(write(tmp_path, MACHINE | files)) == 8 * GIB


def test_available_memory_of_a_job_or_container(tmp_path):
    """cgroup v2: the limit is on the job, above the step that the process is in; cached files are given up."""
    job = {
        "proc/self/cgroup": "0::/slurm/job/step\n",
        "sys/fs/cgroup/slurm/job/step/memory.max": "max\n",
        "sys/fs/cgroup/slurm/job/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/slurm/job/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/slurm/job/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
    }
    assert available_memory(write(tmp_path / "job", MACHINE | job)) == 2 * GIB
    container = {name.replace("/slurm/job/memory", "/memory"): text for name, text in job.items()}
    assert available_memory(write(tmp_path / "container", MACHINE | container)) == 2 * GIB


def test_available_memory_under_cgroup_version_1(tmp_path):
    group = "sys/fs/cgroup/memory/docker/id"
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/id\n0::/\n",
        f"{group}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{group}/memory.usage_in_bytes": f"{3 * GIB}\n",
        f"{group}/memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {GIB // 2}\n",
    }
    assert available_memory(write(tmp_path, MACHINE | files)) == 1.5 * GIB


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_where_memory_cannot_be_measured(monkeypatch, device):
    def refuse(self) -> None:
        raise PermissionError

    monkeypatch.setattr(CpuMemory, "reset_peak", refuse)
    with pytest.raises(UserError, match="needs to measure memory") as error:
        memory_of(torch.device(device))
    assert "data.batch_size=32" in error.value.render()
