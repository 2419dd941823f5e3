"""report.html of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from src.engine import features


def write(folder: Path, phases: Any, result: dict[str, Any]) -> dict[str, Callable[[], bytes]]:
    """Returns the page's plots: label -> a function that draws it as a PNG."""
    from src.engine.reports import plots
    from src.engine.reports.report import write_report

    plots.DRAWN.clear()
    write_report(folder, phases, result)
    return {label: partial(plots.to_png, figure) for label, figure in plots.DRAWN.items()}


features.add(
    features.Feature(
        name="reports",
        about="report.html: the curves, confusions, memory and settings of a run on one page",
        files=("scripts/benchmarks/pipeline.py", "scripts/figures/"),
        run_report=write,
    )
)
