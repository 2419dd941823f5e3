"""How many CPU cores there are for the work at hand. Apart from machine.py, which imports torch."""

from __future__ import annotations

import os

TRIAL_CPUS = "TRIAL_CPUS"  # environment variable: the cores a sweep gives to a trial; src/tuning/trainable.py sets it


def cpu_cores() -> int:
    """The cores this process may use, which on a shared machine, or in a trial of a sweep, are fewer than there are."""
    if TRIAL_CPUS in os.environ:
        return max(1, int(float(os.environ[TRIAL_CPUS])))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
