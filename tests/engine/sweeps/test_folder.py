"""A sweep that is taken up: whose folder it is, and what of it may have changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps.folder import IDENTITY, open_sweep, scratch_folder
from src.engine.sweeps.launch import GivenJobs
from src.engine.sweeps.sweep_journal import TrialRecord

SAME = {"kind": "sweeper", "space": {"lr": ["1", "2"]}, "seed": 0, "config": {}}


def begin(folder, identity=SAME, resume="auto"):
    with open_sweep(folder, identity, resume) as journal:
        journal.started(0, str(folder / "0"), {"lr": 1}, ["lr=1"])


def refused(folder, identity=SAME, resume="auto") -> UserError:
    with pytest.raises(UserError) as error, open_sweep(folder, identity, resume):
        pass
    return error.value


@pytest.mark.parametrize("resume", ["auto", "true", "True"])
def test_the_same_sweep_goes_on_with_what_it_knows(tmp_path, resume):
    begin(tmp_path)
    with open_sweep(tmp_path, SAME, resume) as journal:
        assert journal.trials[0].params == {"lr": 1}
    assert (tmp_path / ".tune" / "returned").is_dir()


def test_a_setting_that_was_renamed_since_is_the_same(tmp_path):
    begin(tmp_path, SAME | {"config": {"data.num_pictures": 60}})
    with open_sweep(tmp_path, SAME | {"config": {"data.num_images": 60}}, "true") as journal:
        assert journal.trials[0].params == {"lr": 1}
    assert "data.num_images" in refused(tmp_path, SAME | {"config": {"data.num_images": 70}}).why


def test_another_sweep_is_refused_with_what_differs(tmp_path):
    begin(tmp_path)
    error = refused(tmp_path, SAME | {"seed": 1, "search": "grid"})
    assert error.found == f"{tmp_path.name} is the folder of another sweep"
    assert error.why == "seed: 0 there, 1 now\nsearch: None there, grid now"
    assert json.loads((tmp_path / IDENTITY).read_text())["seed"] == 0
    begin(tmp_path)


def test_where_no_trial_has_begun_anything_may_be_changed(tmp_path):
    """The first command was mistyped, or ended at once."""
    with open_sweep(tmp_path, SAME, "auto"):
        pass
    begin(tmp_path, SAME | {"seed": 1}, resume="false")
    assert "seed: 1 there" in refused(tmp_path).why


def test_resume_is_taken_at_its_word(tmp_path):
    error = refused(tmp_path, resume="true")
    assert (error.found, error.code) == ("there is no sweep to go on with", ExitCode.NO_INPUT)
    assert not list(tmp_path.iterdir())
    begin(tmp_path, resume="false")
    assert refused(tmp_path, resume="false").found == f"a sweep named {tmp_path.name} exists already"
    assert refused(tmp_path, resume="maybe").found == "resume=maybe is not a choice"


def test_two_commands_do_not_work_on_one_sweep(tmp_path):
    with open_sweep(tmp_path, SAME, "auto"):
        assert refused(tmp_path).code == ExitCode.BUSY
    begin(tmp_path)


def test_files_that_were_half_written_are_removed_where_they_are_the_sweeps(tmp_path):
    begin(tmp_path)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    own = [tmp_path / name for name in ("sweep.json", "trials.jsonl", ".tune/returned/3.json")]
    for name in (*own, tmp_path / "notes.txt"):
        Path(f"{name}.{dead.stdout.strip()}.tmp").touch()
    begin(tmp_path)
    assert [path.name.split(".")[0] for path in tmp_path.rglob("*.tmp")] == ["notes"]


def test_the_folder_is_free_again_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError, match="of a trial"), open_sweep(tmp_path, SAME, "auto"):
        raise RuntimeError("of a trial")
    begin(tmp_path)


def test_a_setting_that_changed_is_named_with_both_ways_out(tmp_path):
    """In conf/, or on the command line: either way old and new trials would not be comparable."""
    begin(tmp_path, SAME | {"config": {"model.dropout": 0.0, "optimizer.lr": 1, "trainer.threads": 1, "gone": 2}})
    now = {"config": {"model.dropout": 0.5, "optimizer.lr": 1, "trainer.threads": 4}}
    error = refused(tmp_path, SAME | now)
    assert error.why == "model.dropout: 0.0 there, 0.5 now\ngone: 2 there, nothing now"
    assert f"{tmp_path.name}-2" in error.fix[0]
    assert "model.dropout=0.0 gone=2" in error.fix[1]
    begin(tmp_path, SAME | {"config": now["config"] | {"model.dropout": 0.0, "gone": 2}})


def test_lists_of_values_may_grow(tmp_path):
    begin(tmp_path, SAME | {"space": {"lr": ["1", "2"], "x": "0 to 1"}})
    begin(tmp_path, SAME | {"space": {"lr": ["3", "2", "1"], "x": "0 to 1"}})
    assert refused(tmp_path, SAME | {"space": {"lr": ["1", "2"], "x": "0 to 1"}}).why.startswith("lr: ['3', '2', '1']")
    assert "x: 0 to 1 there, 0 to 2 now" in refused(tmp_path, SAME | {"space": {"lr": list("123"), "x": "0 to 2"}}).why
    assert "y: None there" in refused(tmp_path, SAME | {"space": {"lr": list("123"), "x": "0 to 1", "y": ["1"]}}).why


def test_the_folder_of_an_earlier_version_goes_on(tmp_path):
    begin(tmp_path)
    old = {"kind": "sweeper", "space": ["lr   1, 2"], "fixed": ["a=1"], "seed": 0}
    (tmp_path / IDENTITY).write_text(json.dumps(old))
    assert "seed: 0 there, 1 now" in refused(tmp_path, SAME | {"seed": 1}).why
    begin(tmp_path)
    assert json.loads((tmp_path / IDENTITY).read_text())["space"] == SAME["space"]


@pytest.mark.parametrize("content", ["", "[1]", "null", "[" * 100_000, "{"])
def test_a_damaged_identity_is_an_error_of_the_data(tmp_path, content):
    begin(tmp_path)
    (tmp_path / IDENTITY).write_text(content)
    assert refused(tmp_path).code == ExitCode.DATA


@pytest.mark.parametrize("name", ["trials.jsonl", "sweep.json", "sweep.log", ".tune", ".tune/returned", ".tune/lock"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_files_that_no_sweep_has_made_are_refused_before_anything_is_written(tmp_path, name, kind):
    """A link to somebody's file, a pipe that would be waited for, a folder in the place of a file."""
    theirs, folder = tmp_path / "theirs", tmp_path / "sweep"
    (theirs / "state").mkdir(parents=True)
    begin(folder)
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "link": lambda link: link.symlink_to(theirs), "folder": Path.mkdir}[kind](path)
    if kind == "folder" and name in (".tune", ".tune/returned"):
        begin(folder)
    else:
        assert refused(folder).code == ExitCode.DATA
    assert list(theirs.iterdir()) == [theirs / "state"]


def test_damaged_lines_are_said(tmp_path, caplog):
    begin(tmp_path)
    with (tmp_path / "trials.jsonl").open("ab") as file:
        file.write(b'{"event": "ro\n\0\0\xff\n{"event": "ended", "trial": 0, "state": "finished", "va')
    with open_sweep(tmp_path, SAME, "auto") as journal:
        assert journal.trials[0].state == "running"
    assert "trials.jsonl is damaged: what lines 2, 3 said of their trials is lost" in caplog.text


def test_each_start_has_a_new_folder_for_tune_and_none_is_left(tmp_path):
    (tmp_path / ".tune" / "state").mkdir(parents=True)
    (tmp_path / ".tune" / "tune-killed").mkdir()
    with scratch_folder(tmp_path) as made:
        assert [made] == list((tmp_path / ".tune").iterdir())
    assert not list((tmp_path / ".tune").iterdir())


JOBS = GivenJobs(
    {
        4: ["model=small", "optimizer.lr=1e-3", "+seed=1", "name=x"],
        5: ["model=small", "optimizer.lr=2e-3", "+seed=2", "name=x"],
        6: ["model=small", "optimizer.lr=auto", "+seed=2", "name=x", "trainer.devices=2"],
    }
)


def test_what_jobs_have_in_common_is_no_parameter_and_numbers_are_numbers():
    assert JOBS.params({"job": 4}) == {"optimizer.lr": 1e-3, "seed": 1}
    assert JOBS.params({"job": 6}) == {"optimizer.lr": "auto", "seed": 2, "trainer.devices": 2}
    assert type(JOBS.params({"job": 4})["seed"]) is int
    assert JOBS.overrides({"job": 5}) == JOBS.jobs[5]


def test_a_job_that_was_another_one_is_refused():
    assert JOBS.read(TrialRecord(4, "runs/x/4", {}, JOBS.jobs[4])) == {"job": 4}
    with pytest.raises(UserError, match="x is the folder of another sweep"):
        JOBS.read(TrialRecord(4, "runs/x/4", {}, ["model=large"]))
