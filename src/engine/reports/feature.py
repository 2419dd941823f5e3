"""report.html of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.engine import features
from src.engine.commands.rule_kinds import unread

if TYPE_CHECKING:
    from src.engine.commands.schema import Rule
    from src.engine.runs.shown import Shown


def rules() -> list[Rule]:
    return [unread("report.explain", "<report.page>", lambda c: c.report.page, "it is shown on that page")]


def write(folder: Path, phases: Any, result: dict[str, Any], shown: Shown | None) -> dict[str, Callable[[], bytes]]:
    """Returns the page's plots: label -> a function that draws it as a PNG."""
    from src.engine.reports import plots
    from src.engine.reports.report import write_report

    plots.DRAWN.clear()
    write_report(folder, phases, result, shown)
    return {label: partial(plots.to_png, figure) for label, figure in plots.DRAWN.items()}


features.add(
    features.Feature(
        name="reports",
        about="report.html: what a run reaches, its mistakes, labels in doubt and curves on one page; python -m src.report",
        files=("src/report.py", "docs/report.md", "scripts/benchmarks/pipeline.py", "scripts/figures/"),
        help={"programs": "python -m src.report run=runs/NAME"},
        reads=("report", "report.page", "report.explain", "data.background", "data.max_megapixels"),
        rules=rules,
        run_report=write,
    )
)
