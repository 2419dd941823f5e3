"""report.html of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.engine import features


def write(folder: Path, goal: Any, results: dict[str, Any]) -> None:
    from src.engine.sweep_reports.sweep_report import write_sweep_report

    write_sweep_report(folder, goal, results)


features.add(
    features.Feature(
        name="sweep_reports",
        about="report.html of a sweep: its trials, curves and parameters on one page",
        files=("docs/images/sweep_report.png", "scripts/figures/sweeps.py"),
        needs=("reports", "sweeps"),
        sweep_report=write,
    )
)
