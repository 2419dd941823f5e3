"""How much memory training steps may use, and how much they did: of a GPU, or of a machine that trains on its CPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from src.errors import ExitCode, UserError
from src.user_command import corrected

MIB = 2**20


class DeviceMemory(Protocol):
    """The memory that training steps live in. Sizes are in bytes."""

    name: str

    def usable(self) -> int:
        """What this process holds, and what it could still get."""

    def reset_peak(self) -> None:
        """From here on peak() counts."""

    def held(self) -> int:
        """What this process holds now."""

    def peak(self) -> int:
        """The most it held since reset_peak."""


def memory_of(device: torch.device) -> DeviceMemory:
    """The memory of a device. Raises UserError where the peak of a step cannot be read: an Apple GPU, a CPU without /proc."""
    if device.type == "cuda":
        return GpuMemory(device)
    if device.type == "cpu":
        memory = CpuMemory()
        with suppress(OSError):
            memory.reset_peak()
            return memory
    raise UserError(
        f"data.batch_size=auto needs to measure memory, which is not possible on this {device.type}",
        why="it can be measured on CUDA GPUs, and on CPUs under Linux, where /proc/self/clear_refs can be written",
        fix=corrected("data.batch_size=32"),
        code=ExitCode.UNAVAILABLE,
    )


class GpuMemory:
    """What torch allocates on a CUDA device; other processes' share is not usable."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, torch.cuda.get_device_name(device)

    def usable(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


class CpuMemory:
    """What this process has resident; Linux keeps the peak of it, and forgets the peak when told to (man proc_pid_clear_refs).

    The tensors that autograd keeps would be a rough guess: a step also holds gradients and what the kernels work in.
    """

    name = "the memory of this machine"

    def usable(self) -> int:
        return self.held() + available_memory()

    def reset_peak(self) -> None:
        give_back_freed_memory()  # else it is part of every peak, and hides what a step takes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def held(self) -> int:
        return _kibibytes(Path("/proc/self/status"), "VmRSS")

    def peak(self) -> int:
        return _kibibytes(Path("/proc/self/status"), "VmHWM")


def give_back_freed_memory() -> None:
    """To the system: glibc keeps what was freed for later use, and it stays resident. Nothing elsewhere."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take on Linux: from the machine, or from its container or job if that has less.

    root: where proc/ and sys/ are.
    """
    return min([_kibibytes(root / "proc/meminfo", "MemAvailable"), *_rooms_of_cgroups(root)])


# Control groups, version 2 and version 1: where they are mounted, limit, use, and the cached files in that use, which are
# given up when memory is short (https://docs.kernel.org/admin-guide/cgroup-v2.html).
CGROUPS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _rooms_of_cgroups(root: Path) -> Iterator[int]:
    """Bytes left in each group that the process is in; a limit may stand at any level, such as that of a SLURM job."""
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controller, path = line.split(":", 2)
        if controller not in CGROUPS:
            continue
        limit, used, cached = CGROUPS[controller]
        mount = root / "sys/fs/cgroup" / controller
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            with suppress(OSError, ValueError):  # no limit at this level: there is no file, or it says "max"
                stat = re.search(rf"^{cached} (\d+)", (group / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
                yield _number(group / limit) - _number(group / used) + int(stat[1])
            group = group.parent


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))


def _kibibytes(file: Path, name: str) -> int:
    """Bytes of a line such as 'VmHWM:   1234 kB'."""
    found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{file} has no {name}"
    return int(found[1]) * 1024
