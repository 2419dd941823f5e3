"""report.html of a run."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.engine import features
from src.engine.commands.rule_kinds import unread

if TYPE_CHECKING:
    from src.engine.commands.schema import Config, Rule
    from src.engine.runs.shown import Shown

log = logging.getLogger(__name__)


def rules() -> list[Rule]:
    return [unread("report.explain", "<report.page>", lambda c: c.report.page, "it is shown on that page")]


def write(folder: Path, phases: Any, result: dict[str, Any], shown: Shown | None) -> dict[str, Callable[[], bytes]]:
    """Returns the page's plots: label -> a function that draws it as a PNG."""
    from src.engine.reports import plots
    from src.engine.reports.report import write_report

    plots.DRAWN.clear()
    write_report(folder, phases, result, shown)
    return {label: partial(plots.to_png, figure) for label, figure in plots.DRAWN.items()}


def write_folds(folder: Path, config: Config) -> None:
    """By src/report.py, which knows how a run's images are read; in a process of its own, since a run may have had its own too
    and this one no torch. A page that cannot be made is no error of the folds."""
    if not config.report.page:
        return
    words = ["-m", "src.report", f"run={folder}"]
    done = subprocess.run([sys.executable, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 0:
        log.info(f"\n{(done.stderr + done.stdout).strip()}")
    else:
        log.warning(
            f"report.html could not be written; {shlex.join(['python', *words])} says why. The folds are complete."
        )


features.add(
    features.Feature(
        name="reports",
        about="report.html: what a run reaches, its mistakes, labels in doubt and curves on one page; python -m src.report",
        files=("src/report.py", "docs/report.md", "scripts/benchmarks/pipeline.py", "scripts/figures/"),
        help={"programs": "python -m src.report run=runs/NAME"},
        reads=("report", "report.page", "report.explain", "data.background", "data.max_megapixels"),
        rules=rules,
        run_report=write,
        folds_report=write_folds,
    )
)
