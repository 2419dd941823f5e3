"""What run= and model= mean, and what is said of a folder that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.engine.runs.errors import UserError
from src.engine.runs.run_lookup import find_model, find_run


def make_run(path: Path, state: str = "finished", model: bool = True) -> None:
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").touch()
    result = {"state": state, "command": "python -m src.train name=x 'data.root=my photos'", "error": "KeyError: 'a'"}
    (path / "result.json").write_text(json.dumps(result))
    if model:
        (path / "model").mkdir()
        (path / "model/model.json").touch()


@pytest.fixture
def typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/pets"))
    make_run(Path("runs/a b"))
    make_run(Path("runs/failed"), "failed", model=False)
    make_run(Path("runs/stopped"), "interrupted", model=False)
    make_run(Path("runs/sweep/0"))
    make_run(Path("runs/sweep/1"), "failed", model=False)
    monkeypatch.setenv("TRAIN_COMMAND", "python -m src.evaluate run=x split=val")


def test_a_run_is_found_however_it_is_written(typed):
    assert find_run("runs/pets/") == Path("runs/pets")
    assert find_run("./runs/pets") == Path("runs/pets")
    assert find_model("runs/pets/model/") == Path("runs/pets/model")


@pytest.mark.parametrize(
    ("text", "named", "fix"),
    [
        ("runs/pets/model", "lies in the folder of a run", "run=runs/pets"),
        ("runs/pets/checkpoints/best.ckpt", "lies in the folder of a run", "run=runs/pets"),
        ("pets", "is not the folder of a run", "run=runs/pets"),
        ("a b", "is not the folder of a run", "'run=runs/a b'"),
        ("runs/sweep", "of 1 finished runs", "run=runs/sweep/0"),
    ],
)
def test_what_was_meant_is_offered(typed, text, named, fix):
    with pytest.raises(UserError, match=named) as caught:
        find_run(text)
    assert caught.value.fix[0] == f"python -m src.evaluate {fix} split=val"


def test_only_runs_with_a_model_are_offered(typed):
    with pytest.raises(UserError) as caught:
        find_run("runs/nothing")
    assert len(caught.value.fix) == 2
    assert not any("failed" in fix or "stopped" in fix for fix in caught.value.fix)


@pytest.mark.parametrize(("run", "said"), [("failed", "KeyError: 'a'"), ("stopped", "the same command continues it")])
def test_a_run_without_a_model_says_how_it_stands(typed, run, said):
    with pytest.raises(UserError, match=f"the run {run} has no model") as caught:
        find_run(f"runs/{run}")
    assert said in caught.value.why
    assert caught.value.fix[0] == "python -m src.train name=x 'data.root=my photos'"


def test_a_run_in_the_place_of_a_model(typed, monkeypatch):
    monkeypatch.setenv("TRAIN_COMMAND", "python -m src.predict model=runs/pets images=y")
    with pytest.raises(UserError, match="is the folder of a run") as caught:
        find_model("runs/pets")
    assert caught.value.fix == [
        "python -m src.predict model=runs/pets/model images=y",
        "python -m src.predict images=y run=runs/pets",
    ]
