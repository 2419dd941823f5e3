"""The machine, without torch: CPU cores, memory, disk, shared memory."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected
from src.engine.doctor.findings import Findings
from src.engine.images.time_limit import NoAnswer, hang_error, one_by_one
from src.engine.memory.ram import available_ram
from src.engine.runs.cores import cpu_cores
from src.engine.runs.files import make_folder
from src.engine.runs.text import printable, shell_word

Result = TypeVar("Result")

GB = 10**9
SHARED_MEMORY = Path("/dev/shm")
LEAST_RAM, LEAST_DISK, LEAST_SHARED = 2 * GB, 2 * GB, GB // 2
ANSWER_SECONDS = 20.0  # for a file system; a network disk that went away never answers


def check_machine(findings: Findings, config: Config) -> None:
    cores, quota = cpu_cores(), cpu_quota()
    of = f" of {os.cpu_count()}" if cores != os.cpu_count() else ""
    if quota is not None and quota < cores:
        allowed = max(1, int(quota))
        text = f"{cores} cores{of}, but the container may use the time of {quota:g}: more threads wait for each other"
        fix = corrected(f"trainer.threads={allowed}", f"data.num_workers={allowed}")
        settled = (config.trainer.threads or cores) <= allowed
        findings.ok("CPU", text) if settled else findings.warn("CPU", text, fix)
    else:
        findings.ok("CPU", f"{cores} cores{of}")
    if sys.platform == "linux":
        _compare(findings, "RAM", "free", available_ram(), LEAST_RAM, "ps aux --sort=-rss | head")
        if config.data.num_workers != 0 and SHARED_MEMORY.is_dir():
            free = shutil.disk_usage(SHARED_MEMORY).free
            fix = ("docker run --shm-size=8g", corrected("data.num_workers=0"))
            _compare(findings, "/dev/shm", "for the batches of loader processes", free, LEAST_SHARED, *fix)


def check_disk(findings: Findings, config: Config) -> None:
    """Raises UserError where no run can be written, or a disk does not answer."""
    folders = [path for path in (config.data.root, config.data.table) if path]
    for folder in folders:
        answered(Path(folder), Path.stat)
    runs = Path(config.runs_dir)
    answered(runs, lambda path: make_folder(path, "runs_dir"))
    free, path = answered(runs, shutil.disk_usage).free, shell_word(runs)
    _compare(findings, "disk", f"free in {printable(runs)}", free, LEAST_DISK, f"du -sh {path}/* | sort -h")


def answered(path: Path, work: Callable[[Path], Result]) -> Result:
    """work(path), or a UserError where that takes too long."""
    try:
        return one_by_one(work, [path], ANSWER_SECONDS)[0]
    except NoAnswer as error:
        raise hang_error(str(error), may_set=False) from error


def _compare(findings: Findings, title: str, what: str, free: int, least: int, *fix: str) -> None:
    text = f"{free / GB:,.1f} GB {what}"
    if free < least:
        findings.warn(title, f"{text}, which is little", *fix)
    else:
        findings.ok(title, text)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU time that the container or job may use, in cores; None: no limit. root: where proc/ and sys/ are.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max; of version 1: cpu.cfs_quota_us.
    """
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    with suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            group = mount / path.lstrip("/")
            while group.is_relative_to(mount):
                with suppress(OSError, ValueError):  # no limit at this level: there is no file, or it says "max"
                    if controllers:
                        numbers = [int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")]
                    else:
                        numbers = [int(number) for number in (group / "cpu.max").read_text().split()]
                    if numbers[0] > 0:
                        yield numbers[0] / numbers[1]
                group = group.parent
