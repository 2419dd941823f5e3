"""The journal of a sweep: what was written is read again, also after a crash; the best so far; the ranking."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from src.reporting import sweep_journal
from src.reporting.sweep_journal import FAILED, FINISHED, PAUSED, PRUNED, RUNNING, Journal, TrialRecord, ranking
from src.tuning.goal import Goal


@pytest.fixture
def clock(monkeypatch):
    """The journal's time, to be set: clock[0] = seconds."""
    now = [1000.0]
    monkeypatch.setattr(sweep_journal.time, "time", lambda: now[0])
    return now


def with_rows(*values: float, number: int = 0, **fields) -> TrialRecord:
    rows = {epoch: {"epoch": epoch, "val/acc": value} for epoch, value in enumerate(values, start=1)}
    return TrialRecord(number, f"runs/x/{number}", {}, [], rows=rows, **fields)


def test_what_was_written_is_read_again(tmp_path):
    journal = Journal(tmp_path)
    journal.started(0, "runs/x/0", {"optimizer.lr": 0.1}, ["optimizer.lr=0.1"])
    journal.row(0, {"epoch": 1, "val/acc": 0.5})
    journal.started(1, "runs/x/1", {"optimizer.lr": 0.2}, ["optimizer.lr=0.2"])
    journal.ended(1, FAILED, error="ValueError: ä boom\u2028of two")
    journal.row(0, {"epoch": 2, "val/acc": 0.75})
    journal.ended(0, FINISHED, value=0.75)
    again = Journal(tmp_path)
    assert again.trials == journal.trials
    assert again.trials[0].rows == {1: {"epoch": 1, "val/acc": 0.5}, 2: {"epoch": 2, "val/acc": 0.75}}
    assert (again.trials[0].state, again.trials[0].value) == (FINISHED, 0.75)
    assert (again.trials[1].state, again.trials[1].error) == (FAILED, "ValueError: ä boom\u2028of two")


def cut_off(folder) -> bytes:
    """Leaves a journal of one row whose second one was cut off by a crash; returns what is whole of it."""
    journal = Journal(folder)
    journal.started(0, "runs/x/0", {}, [])
    journal.row(0, {"epoch": 1, "val/acc": 0.5})
    whole = journal.path.read_bytes()
    journal.row(0, {"epoch": 2, "val/acc": 0.6})
    journal.path.write_bytes(journal.path.read_bytes()[:-10])
    return whole


def test_a_line_that_was_cut_off_is_left_out_and_the_next_one_is_whole(tmp_path):
    cut_off(tmp_path)
    journal = Journal(tmp_path)
    assert list(journal.trials[0].rows) == [1]
    journal.row(0, {"epoch": 2, "val/acc": 0.75})
    assert Journal(tmp_path).trials[0].rows[2]["val/acc"] == 0.75


def test_a_crash_while_the_cut_off_line_is_taken_out_loses_nothing(tmp_path, monkeypatch):
    whole = cut_off(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        Journal(tmp_path)
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(whole)


def test_a_trial_that_goes_on_keeps_its_rows_and_takes_new_parameters(tmp_path, clock):
    journal = Journal(tmp_path)
    journal.started(3, "runs/x/3", {"optimizer.lr": 0.1}, ["optimizer.lr=0.1"])
    journal.row(3, {"epoch": 1, "val/acc": 0.5})
    journal.row(3, {"epoch": 2, "val/acc": 0.6})
    journal.ended(3, FAILED, error="killed")
    clock[0] += 100
    journal.started(3, "runs/x/3", {"optimizer.lr": 0.2}, ["optimizer.lr=0.2"])
    journal.row(3, {"epoch": 2, "val/acc": 0.7})
    trial = journal.trials[3]
    assert {epoch: row["val/acc"] for epoch, row in trial.rows.items()} == {1: 0.5, 2: 0.7}
    assert (trial.params, trial.overrides) == ({"optimizer.lr": 0.2}, ["optimizer.lr=0.2"])
    assert (trial.state, trial.error, trial.ended, trial.started) == (RUNNING, "", None, 1000.0)


def test_seconds_are_of_work_and_not_of_a_pause(tmp_path, clock):
    journal = Journal(tmp_path)
    journal.started(0, "runs/x/0", {}, [])
    clock[0] += 10
    journal.row(0, {"epoch": 1})
    clock[0] += 5
    assert journal.trials[0].worked(clock[0]) == 15
    journal.ended(0, PAUSED)
    clock[0] += 1000
    assert journal.trials[0].worked(clock[0]) == 15
    journal.started(0, "runs/x/0", {}, [])
    clock[0] += 7
    journal.ended(0, PAUSED)
    clock[0] += 1000
    journal.ended(0, PRUNED)  # by a scheduler, while it was paused
    assert journal.trials[0].seconds == 22


def test_seconds_are_not_of_the_time_between_a_kill_and_the_next_start(tmp_path, clock):
    journal = Journal(tmp_path)
    journal.started(0, "runs/x/0", {}, [])
    clock[0] += 10
    journal.row(0, {"epoch": 1})
    clock[0] += 28_800
    again = Journal(tmp_path)
    again.started(0, "runs/x/0", {}, [])
    clock[0] += 3
    again.ended(0, FINISHED, value=1.0)
    assert again.trials[0].seconds == 13


def test_best_is_the_best_so_far_and_the_first_of_equal_epochs():
    trial = with_rows(0.5, 0.9, 0.25, 0.9, float("nan"))
    assert trial.best(Goal("val/acc", "max")) == (0.9, 2)
    assert trial.best(Goal("val/acc", "min")) == (0.25, 3)


def test_best_of_a_job_that_reports_nothing_is_what_it_returned():
    assert with_rows(value=0.4).best(Goal("val/acc", "max")) == (0.4, None)
    assert with_rows(value=float("nan")).best(Goal("val/acc", "max")) is None
    assert with_rows().best(Goal("val/acc", "max")) is None


def test_what_a_job_returned_is_not_taken_for_a_metric_that_it_does_not_report():
    assert with_rows(0.5, value=0.5).best(Goal("val/loss", "min")) is None
    assert with_rows(float("nan"), value=0.5).best(Goal("val/acc", "max")) is None


def test_ranking_leaves_out_what_failed_or_has_no_value_and_prefers_the_earlier_of_equals():
    trials = [
        with_rows(0.5, 0.2, number=4),
        with_rows(0.99, number=1, state=FAILED),
        with_rows(number=2),
        with_rows(0.5, number=3, state=PRUNED),
        with_rows(0.7, number=0, state=FINISHED),
    ]
    known = {trial.number: trial for trial in trials}
    assert [trial.number for trial in ranking(known, Goal("val/acc", "max"))] == [0, 3, 4]
    assert [trial.number for trial in ranking(known, Goal("val/acc", "min"))] == [4, 3, 0]


def test_reading_a_journal_needs_neither_torch_nor_ray():
    code = "import sys, src.reporting.sweep_journal; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=sweep_journal.__file__.rpartition("src")[0]).returncode == 0


def test_a_trial_that_is_started_again_remembers_that_it_was_pruned(tmp_path):
    journal = Journal(tmp_path)
    for number, state in ((0, PRUNED), (1, FINISHED)):
        journal.started(number, f"runs/x/{number}", {}, [])
        journal.row(number, {"epoch": 2, "val/acc": 0.5})
        journal.ended(number, state)
        journal.started(number, f"runs/x/{number}", {}, [])
    assert [trial.was_pruned for trial in Journal(tmp_path).trials.values()] == [True, False]
