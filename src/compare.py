"""Compares runs: their metrics, the settings that differ, their curves, and which differences are larger than chance.

    python -m src.compare runs/a runs/b runs/c          what is printed, and runs/comparison.png with the curves
    python -m src.compare runs/sweep/*                  the jobs of a sweep
    python -m src.compare runs/a runs/b out=curves.png  the curves elsewhere

Two runs with the same test images are compared image by image: by McNemar's exact test, of task=regression by a bootstrap.
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys

from src import rules  # noqa: F401 (registers the settings)
from src.engine.runs.errors import run_and_report
from src.engine.runs.imports import importing
from src.engine.runs.run_lookup import runs_to_compare
from src.engine.runs.text import path_in


def work() -> None:
    runs, out = runs_to_compare(sys.argv[1:], __doc__ or "")
    with importing():  # scipy and matplotlib take seconds
        from src.engine.runs.comparison import compare

    compare(runs, path_in(out) if out else runs[0].parent / "comparison.png")


if __name__ == "__main__":
    sys.exit(run_and_report(work))
