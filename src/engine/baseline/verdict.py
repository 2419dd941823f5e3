"""What the baseline reaches, in words, and what training gained over it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from src.engine.runs.bootstrap import metric_intervals
from src.engine.runs.checkpoint_selection import State
from src.engine.runs.job import Job
from src.engine.runs.measuring import Measured
from src.engine.runs.outputs import Outputs
from src.engine.runs.paired import metric_gain
from src.engine.runs.selection import Chosen
from src.engine.runs.tables import BASELINE, column_titles, compared_metric
from src.engine.runs.task import RunTask
from src.engine.runs.text import decimal
from src.engine.steps.task_kind import TaskKind

WHAT = "a linear model on the features of the untouched backbone"


@dataclass
class Baseline:
    """metrics: val/acc, test/acc, ..., the finite ones, with thresholds that were chosen for it on val, as the run has its own.
    as_epochs: those of val with the thresholds that the epochs have."""

    kind: TaskKind  # with these thresholds
    strength: float  # of the regularisation, see linear.py
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the same names: 95 %
    as_epochs: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, Outputs] = field(default_factory=dict)  # split -> what they follow from
    state: State | None = None  # the network's weights with it, where the run may end with them

    def add(self, split: str, values: dict[str, float], outputs: Outputs, task: RunTask, seed: int) -> None:
        sure = metric_intervals(self.kind, task.images.classes, outputs, values, seed, outputs.groups(task.images))
        self.outputs[split] = outputs
        self.metrics |= {f"{split}/{name}": value for name, value in values.items()}
        self.intervals |= {f"{split}/{name}": interval for name, interval in sure.items()}


def introduced(baseline: Baseline, monitor: str) -> str:
    """'val accuracy 0.932 (0.901 to 0.955 with 95 % confidence) by a linear model on ...'"""
    name = monitor.partition("/")[2]
    value, interval = baseline.metrics.get(f"val/{name}"), baseline.intervals.get(f"val/{name}")
    if value is None:
        return f"{WHAT} has no finite val/{name}"
    sure = f" ({interval[0]:.3f} to {interval[1]:.3f} with 95 % confidence)" if interval else ""
    return f"val {_title(name)} {decimal(value)}{sure} by {WHAT}"


def for_result(job: Job, task: RunTask, measured: Measured, baseline: Baseline, chosen: Chosen) -> dict[str, Any]:
    """What result.json keeps of it: its numbers, and what the trained network gains over it."""
    values: dict[str, Any] = {
        "metrics": baseline.metrics,
        "as_epochs": baseline.as_epochs,
        "intervals": baseline.intervals,
        "images": {split: len(outputs.members) for split, outputs in baseline.outputs.items()},
        "strength": baseline.strength,
        "gain": None,
        "verdict": "",
    }
    split = "test" if "test" in baseline.outputs else "val"
    name = compared_metric(job.config.checkpoint.monitor, baseline.metrics)
    key = f"{split}/{name}"
    if chosen.name == BASELINE or not math.isfinite(measured.get(key, math.nan)) or key not in baseline.metrics:
        return values
    both = (task.kind, measured.outputs[split]), (baseline.kind, baseline.outputs[split])
    numbers, groups = (measured[key], baseline.metrics[key]), both[0][1].groups(task.images)
    gain = metric_gain(name, numbers, task.images.classes, both, job.config.seed, groups)
    if split == "val" and gain.value > 0 and job.config.checkpoint.select != "last":
        gain = replace(gain, is_sure=None, how="val has also chosen the epoch")
    values["gain"] = {"metric": key, **asdict(gain)}
    values["verdict"] = f"{split} {_title(name)} {decimal(numbers[1])} by {WHAT}: {gain.said()}"
    return values


def _title(name: str) -> str:
    return column_titles([f"val/{name}"])[name]
