"""The number of usable CPU cores, without importing torch."""

from __future__ import annotations

import os

TRIAL_CPUS = "TRIAL_CPUS"  # environment variable: the cores that a sweep gives to a trial


def cpu_cores() -> int:
    """The cores that this process may use: fewer than the machine has in a batch job, or in a trial of a sweep."""
    if TRIAL_CPUS in os.environ:
        return max(1, int(float(os.environ[TRIAL_CPUS])))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
