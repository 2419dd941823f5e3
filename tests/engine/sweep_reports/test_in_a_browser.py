"""A sweep's page in a real browser, on a phone and on a screen."""

from __future__ import annotations

from src.engine.sweep_reports.sweep_report import write_sweep_report
from src.engine.sweeps.sweep_journal import Goal
from tests.engine.reports.test_in_a_browser import check_page
from tests.engine.reports.test_in_a_browser import pytestmark as pytestmark  # needs a browser
from tests.engine.sweep_reports.test_sweep_report import METRIC, mixed, write_journal


def test_the_page_fits_a_phone_and_a_screen(tmp_path):
    retrained = {
        "folder": "runs/heads/retrained_1_seed_4",
        "metrics": {METRIC: 0.7, "test/acc": 0.625},
        "intervals": {},
    }
    ties = {"trials": [1, 0], "standard_error": 0.02}
    results = {"best_folder": "runs/heads/1", "val_ties": ties, "retrained": retrained}
    folder = write_journal(tmp_path / "heads", mixed(50))
    check_page(write_sweep_report(folder, Goal(METRIC, "max"), results), tmp_path)
