"""report.html of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.engine import features


def write(folder: Path, phases: Any, result: dict[str, Any]) -> None:
    from src.engine.reports.report import write_report

    write_report(folder, phases, result)


features.add(
    features.Feature(
        name="reports",
        about="report.html: the curves, confusions, memory and settings of a run on one page",
        files=("scripts/benchmarks/pipeline.py", "scripts/figures/"),
        run_report=write,
    )
)
