"""The end of a sweep: its files, its report and its ranking."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from src.reporting.sweep_journal import Journal
from src.reporting.sweep_report import write_sweep_report
from src.tuning.goal import Goal
from src.tuning.results import print_ranking, write_results
from src.tuning.table import duration

log = logging.getLogger(__name__)

IMPORT_SECONDS = 5.0  # of torch and Lightning, which Hydra's basic launcher does once


def conclude(folder: Path, journal: Journal, goal: Goal) -> dict:
    """Writes optimization_results.yaml, sweep.csv and report.html, and prints the ranking. Returns the first one's content."""
    shown = Path(os.path.relpath(folder))
    results = write_results(folder, journal, goal, folder.name)
    try:
        write_sweep_report(folder, goal, results.get("command", ""))
    except Exception:  # the sweep is done by now: a page that cannot be made must not turn it into a failed one
        log.warning("the sweep's report.html could not be written; sweep.log says why", exc_info=True)
    print_ranking(journal, goal, shown, folder.name, shown / "report.html")
    return results


def say_if_basic_is_faster(journal: Journal, numbers: Sequence[int], seconds: float) -> None:
    """An honest line: starting Ray takes time, which few short jobs do not bring back. seconds: of this launch."""
    trials = [journal.trials[number] for number in numbers if number in journal.trials]
    work = sum(trial.seconds for trial in trials)
    if work + IMPORT_SECONDS < seconds:
        log.info(
            f"note      {len(trials)} short jobs took {duration(seconds)} with Ray; one after another, without "
            f"hydra/launcher=ray_tune, they would take about {duration(work + IMPORT_SECONDS)}"
        )
