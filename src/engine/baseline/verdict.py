"""What the baseline reaches, in words, and what training gained over it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from src.engine.runs.bootstrap import metric_intervals
from src.engine.runs.checkpoint_selection import State
from src.engine.runs.job import Job
from src.engine.runs.measuring import Measured
from src.engine.runs.outputs import Outputs
from src.engine.runs.paired import metric_gain
from src.engine.runs.tables import column_titles
from src.engine.runs.task import RunTask
from src.engine.runs.text import decimal
from src.engine.steps.task_kind import TaskKind

WHAT = "a linear model on the features of the untouched backbone"


@dataclass
class Baseline:
    """metrics: val/acc, test/acc, ...; the finite ones. Those of val have the thresholds that the epochs have, those of test
    the ones that were chosen for it on val, as the run has its own."""

    kind: TaskKind  # with these thresholds
    strength: float  # of the regularisation, see linear.py
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the same names: 95 %
    outputs: dict[str, Outputs] = field(default_factory=dict)  # split -> what they follow from
    state: State | None = None  # the network's weights with it, where the run may end with them

    def add(self, split: str, values: dict[str, float], outputs: Outputs, task: RunTask, seed: int) -> None:
        sure = metric_intervals(self.kind, task.images.classes, outputs, values, seed, outputs.groups(task.images))
        self.outputs[split] = outputs
        self.metrics |= {f"{split}/{name}": value for name, value in values.items() if math.isfinite(value)}
        self.intervals |= {f"{split}/{name}": interval for name, interval in sure.items()}


def introduced(baseline: Baseline, monitor: str) -> str:
    """'val accuracy 0.932 (0.901 to 0.955 with 95 % confidence) by a linear model on ...'"""
    name = monitor.partition("/")[2]
    value, interval = baseline.metrics.get(f"val/{name}"), baseline.intervals.get(f"val/{name}")
    if value is None:
        return f"{WHAT} has no finite val/{name}"
    sure = f" ({interval[0]:.3f} to {interval[1]:.3f} with 95 % confidence)" if interval else ""
    return f"val {_title(name)} {decimal(value)}{sure} by {WHAT}"


def for_result(job: Job, task: RunTask, measured: Measured, baseline: Baseline) -> dict[str, Any]:
    """What result.json keeps of it: its numbers, and beside those of the trained network what training gained."""
    values: dict[str, Any] = {
        "metrics": baseline.metrics,
        "intervals": baseline.intervals,
        "images": {split: len(outputs.members) for split, outputs in baseline.outputs.items()},
        "strength": baseline.strength,
        "verdict": "",
    }
    split, name = ("test" if "test" in baseline.outputs else "val"), job.config.checkpoint.monitor.partition("/")[2]
    key = f"{split}/{name}"
    if key not in baseline.metrics or key not in measured or (split == "val" and task.kind.tunes):
        return values  # on val, the network's thresholds were chosen on the images themselves
    both = (task.kind, measured.outputs[split]), (baseline.kind, baseline.outputs[split])
    numbers, groups = (measured[key], baseline.metrics[key]), both[0][1].groups(task.images)
    gain = metric_gain(name, numbers, task.images.classes, both, job.config.seed, groups)
    values["gain"] = {"metric": key, "value": gain.value, "is_sure": gain.is_sure, "how": gain.how}
    text = f"training {'gained' if gain.value > 0 else 'lost'} {decimal(abs(gain.value))}"
    known = {True: ", more than chance", False: ", which may be chance", None: ""}[gain.is_sure]
    how = f" ({gain.how})" if gain.how else ""
    values["verdict"] = f"{split} {_title(name)} {decimal(numbers[1])} by {WHAT}: {text}{known}{how}"
    return values


def _title(name: str) -> str:
    return column_titles([f"val/{name}"])[name]
