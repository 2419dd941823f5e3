"""The journal of a sweep: what was written is read again, also after a crash; the best so far; the ranking."""

from __future__ import annotations

import subprocess
import sys

import pytest

from src.engine.project import PROJECT
from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps import sweep_journal
from src.engine.sweeps.sweep_journal import (
    FAILED,
    FINISHED,
    PAUSED,
    PRUNED,
    RUNNING,
    Goal,
    Journal,
    TrialRecord,
    ranking,
)


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


def test_reading_changes_nothing(tmp_path):
    """The line may be one that a sweep is writing at this moment."""
    cut_off(tmp_path)
    before = (tmp_path / "trials.jsonl").read_bytes()
    Journal(tmp_path)
    assert (tmp_path / "trials.jsonl").read_bytes() == before


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.started(0, "runs/x/0", {}, [])
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'{"event": "ro')  # as much of the line as there was room for
    journal.row(0, {"epoch": 1, "val/acc": 0.5})
    assert journal.path.read_bytes().startswith(whole + b'{"event": "row", "trial": 0')
    assert list(Journal(tmp_path).trials[0].rows) == [1]


def test_damaged_lines_in_between_are_left_out_and_said(tmp_path):
    journal = Journal(tmp_path)
    for number in range(2):
        journal.started(number, f"runs/x/{number}", {}, [])
        journal.row(number, {"epoch": 1, "val/acc": 0.5})
    lines = journal.path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0\xff" * 20 + b"\n"
    journal.path.write_bytes(b"".join(lines))
    again = Journal(tmp_path)
    assert list(again.trials) == [0]
    assert again.damaged == [3, 4], "the row of a trial whose beginning is lost is lost too"


FOREIGN = [
    "[]", "null", "7", "{}", '{"event": "started", "trial": 0}', '{"event": "other", "trial": 0, "time": 1}',
    '{"event": "started", "trial": -1, "time": 1, "folder": "x", "params": {}, "overrides": []}',
    '{"event": "started", "trial": "0", "time": 1, "folder": "x", "params": {}, "overrides": []}',
    '{"event": "started", "trial": 0, "time": NaN, "folder": "x", "params": {}, "overrides": []}',
    '{"event": "started", "trial": 0, "time": 1, "folder": 7, "params": {}, "overrides": []}',
    '{"event": "started", "trial": 0, "time": 1, "folder": "x", "params": {"a": {}}, "overrides": []}',
    '{"event": "started", "trial": 0, "time": 1, "folder": "x", "params": {}, "overrides": [7]}',
    '{"event": "row", "trial": 9, "time": 1, "row": {"epoch": "1"}}',
    '{"event": "row", "trial": 9, "time": 1, "row": {"epoch": 1e400}}',
    '{"event": "row", "trial": 9, "time": 1, "row": {"epoch": 1, "a": 1' + "0" * 400 + "}}",
    '{"event": "row", "trial": 9, "time": 1, "row": [1]}',
    '{"event": "copied", "trial": 9, "time": 1, "rows": [{}]}',
    '{"event": "ended", "trial": 9, "time": 1, "state": "won", "value": 1, "error": ""}',
    '{"event": "ended", "trial": 9, "time": 1, "state": "finished", "value": "1", "error": ""}',
]  # fmt: skip


@pytest.mark.parametrize("line", FOREIGN)
def test_what_no_sweep_has_written_is_an_error_of_the_data(tmp_path, line):
    (tmp_path / "trials.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is of no sweep") as caught:
        Journal(tmp_path)
    assert caught.value.code == ExitCode.DATA


def test_no_number_in_the_file_is_infinite_or_none(tmp_path):
    journal = Journal(tmp_path)
    journal.started(0, "runs/x/0", {"x": float("inf")}, ["x=inf"])
    journal.row(0, {"epoch": 1, "val/acc": float("nan"), "val/loss": float("inf")})
    journal.ended(0, FINISHED, value=float("nan"))
    text = journal.path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert Journal(tmp_path).trials == journal.trials
    assert (journal.trials[0].params, journal.trials[0].rows) == ({"x": "inf"}, {1: {"epoch": 1}})


def test_a_trial_that_goes_on_as_a_copy_has_the_rows_of_its_weights(tmp_path):
    journal = Journal(tmp_path)
    journal.started(0, "runs/x/0", {}, [])
    for epoch in (1, 2, 3):
        journal.row(0, {"epoch": epoch, "val/acc": 0.9})
    journal.copied(0, [{"epoch": 1, "val/acc": 0.1}, {"epoch": 2, "val/acc": 0.2}])
    journal.row(0, {"epoch": 3, "val/acc": 0.3})
    for one in (journal, Journal(tmp_path)):
        assert one.trials[0].best(Goal("val/acc", "max")) == (0.3, 3)


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
    assert (trial.state, trial.error, trial.started) == (RUNNING, "", 1000.0)


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
    code = "import sys, src.engine.sweeps.sweep_journal; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
