"""A job in a worker: from the right checkpoints, and without traces in the process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig

from src.engine.runs.errors import ErrorOfProcess, ExitCode, UserError
from src.engine.sweeps.worker import _restored_process, as_json, describe, keep_checkpoints, name_of, take_over

LR = ["optimizer.lr=0.1"]
FILES = ("config.yaml", "result.json", "metrics.csv", "checkpoints/last.ckpt")


def job_folder(path: Path, says: str) -> Path:
    """The folder of a job, with something in every file that matters."""
    (path / "checkpoints").mkdir(parents=True)
    for name in FILES:
        (path / name).write_text(says)
    return path


@pytest.fixture
def kept(tmp_path):
    """What is kept of trial 7 with LR."""
    folder = job_folder(tmp_path / "7", "of 7")
    (folder / "checkpoints" / "best.ckpt.123.tmp").touch()
    target = tmp_path / "kept"
    target.mkdir()
    keep_checkpoints(folder, target, 7, LR)
    return target


def test_checkpoints_are_kept_without_what_is_half_written(kept):
    assert sorted(path.name for path in (kept / "checkpoints").iterdir()) == ["last.ckpt"]


def test_a_trial_that_goes_on_from_its_own_checkpoint_keeps_what_it_has(kept, tmp_path):
    """It may be newer."""
    folder = job_folder(tmp_path / "runs", "newer")
    take_over(folder, kept, 7, list(LR))
    assert {(folder / name).read_text() for name in FILES} == {"newer"}


@pytest.mark.parametrize(("number", "overrides"), [(2, LR), (7, ["optimizer.lr=0.2"])], ids=["another", "changed"])
def test_a_trial_that_takes_over_begins_with_the_others_checkpoint_and_its_own_settings(
    kept, tmp_path, number, overrides
):
    folder = job_folder(tmp_path / "runs", "own")
    (folder / "checkpoints" / "best.ckpt").write_text("own")
    take_over(folder, kept, number, overrides)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.csv"]
    assert (folder / "metrics.csv").read_text() == "of 7", "the rows of the weights that it has"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (folder / "checkpoints" / "last.ckpt").read_text() == "of 7"


def test_a_trial_takes_over_into_a_folder_that_is_not_there_yet(kept, tmp_path):
    take_over(tmp_path / "new", kept, 3, [])
    assert (tmp_path / "new" / "checkpoints" / "last.ckpt").read_text() == "of 7"


def test_a_job_without_checkpoints_can_be_taken_over_too(tmp_path):
    """Any Hydra application: what it has is its command line."""
    (tmp_path / "kept").mkdir()
    keep_checkpoints(tmp_path / "nothing", tmp_path / "kept", 0, [])
    folder = job_folder(tmp_path / "runs", "own")
    take_over(folder, tmp_path / "kept", 1, [])
    assert not (folder / "checkpoints").exists(), "it would go on from the wrong place"


def test_after_a_job_the_process_is_as_before(tmp_path, monkeypatch):
    monkeypatch.setenv("STAYS", "1")
    before = dict(os.environ), Path.cwd(), list(sys.argv), torch.get_num_threads()

    def job():
        with _restored_process():
            os.environ.update(STAYS="2", NEW="3")
            del os.environ["PATH"]
            os.chdir(tmp_path)
            sys.argv.append("more")
            torch.set_num_threads(before[3] + 1)
            raise ValueError("of the job")

    with pytest.raises(ValueError, match="of the job"):
        job()
    assert (dict(os.environ), Path.cwd(), list(sys.argv), torch.get_num_threads()) == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("the disk is full", where="/"), "the disk is full"),
        (ErrorOfProcess("ERROR   bad image\nwhy     it is", ExitCode.DATA), "bad image"),
        (ValueError("\nboom\nand more"), "ValueError: boom"),
        (KeyError(), "KeyError: (no message)"),
    ],
)
def test_an_error_in_one_line(error, line):
    assert describe(error) == line


@pytest.mark.parametrize(
    ("value", "kept"),
    [(0.5, 0.5), (None, None), ({"acc": 1, "by": (1, 2)}, {"acc": 1, "by": [1, 2]}), (object(), None)],
)
def test_a_return_value_as_json_has_it(value, kept):
    assert as_json(value) == kept


def test_a_job_is_sent_by_name_also_where_its_module_is_the_program(monkeypatch):
    def task(config: DictConfig) -> None: ...

    assert name_of(task) == (__name__, task.__qualname__)
    task.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="src.train"))
    assert name_of(task)[0] == "src.train"
