"""The RAM of this process and of its machine, in bytes. Nothing here needs torch."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


class _Mallinfo2(ctypes.Structure):
    """struct mallinfo2 of glibc >= 2.33: ten numbers, of which two are read here. See mallinfo(3)."""

    _fields_ = (
        ("arena_to_hblks", 4 * ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),  # bytes in blocks of their own (mmap)
        ("usmblks_to_fsmblks", 2 * ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),  # bytes in use on the heap
        ("fordblks_to_keepcost", 2 * ctypes.c_size_t),
    )


def _find_mallinfo2() -> Callable[[], Any] | None:
    function = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None  # glibc's own
    if function is not None:
        function.restype = _Mallinfo2
    return function


_mallinfo2 = _find_mallinfo2()
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def malloc_bytes() -> int | None:
    """Everything that malloc gave out and that is not freed, over all threads; None where the C library cannot tell.

    The resident size is no substitute: it moves by itself, and does not follow what is freed.
    """
    if _mallinfo2 is None:
        return None
    heap = _mallinfo2()
    return heap.uordblks + heap.hblkhd


def resident_bytes() -> int | None:
    """RAM that the process holds now; on macOS the most it ever held; None on Windows."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_peak() -> int:
    """The most RAM that the process held since `reset_resident_peak` (Linux)."""
    return _kibibytes(Path("/proc/self/status"), "VmHWM")


def reset_resident_peak() -> None:
    """Raises OSError outside Linux, and in a container whose /proc cannot be written to. See proc_pid_clear_refs(5)."""
    give_back_freed_memory()  # else it is part of every peak, and hides what a step takes
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees, since the next one needs as much: to give it back and get it again, page by page,
    takes up to a fifth of the time on a CPU. The process holds up to a seventh more. Nothing elsewhere, nor beside settings
    of the user's own. See mallopt(3)."""
    if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            if libc.mallopt(_M_MMAP_THRESHOLD, 256 * 2**20):  # refused before glibc 2.35
                libc.mallopt(_M_TRIM_THRESHOLD, 512 * 2**20)


def give_back_freed_memory() -> None:
    """Returns freed memory to the system, which glibc keeps for later use and which stays resident. Nothing elsewhere."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def available_ram(root: Path = Path("/")) -> int:
    """Bytes that this process can still take on Linux: from the machine, or from its container or job if that has less.

    root: where proc/ and sys/ are.
    """
    return min([_kibibytes(root / "proc/meminfo", "MemAvailable"), *_available_in_cgroups(root)])


# Control groups, version 2 and version 1: where they are mounted, limit, use, and the cached files in that use, which are
# given up when memory is short (https://docs.kernel.org/admin-guide/cgroup-v2.html).
CGROUPS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _available_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes left in each group of the process; a limit may stand at any level, such as that of a SLURM job."""
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
    line = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert line, f"{file} has no {name}"
    return int(line[1]) * 1024
