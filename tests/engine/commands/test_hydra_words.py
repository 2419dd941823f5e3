"""Text is text: what the shell gave is what a text setting holds, from the command line to config.yaml and back."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from src.engine import features
from src.engine.commands import config_checks
from src.engine.commands.hydra_words import for_hydra, is_text, unquoted, without_quotes
from src.engine.commands.suggestions import CONF
from tests.conftest import SMALL, check_error

NAMES = (
    "Bücher", "고양이", "фото", "photos (1)", "it's", 'a "b" c', "100%", "a@b", "a=b", "IMG #2", "a: b", "a,b", "{x}",
    "[2024] x", "$HOME", "C:\\new\\x\\", "trail ", " lead", "-lead", "1e3", "0123", "1_000", "true", "2026-11-28",
    "NULL", "a${b", "${", "a'b\\${c\\", "'q' (2)", "\\", "*", "!x", "&a", "a\tb", "~x", "!!python/x", "x}", "nan",
    "-1", "a;b", "`x`", "<b>", "😀", "é", "e\u0301", "()", "a\nb", "str(5)", "?", "a|b", "@x", "%s", "+x", "int(3)",
    "[a]", "{a: 1}", "1.0",
)  # fmt: skip


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The words as src.train composes them: read('name=x') -> Config."""
    monkeypatch.chdir(tmp_path)
    features.register()
    OmegaConf.register_new_resolver("sweep_name", lambda name, _: name or "sweep", replace=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *words: config_checks.read(compose("train", overrides=for_hydra(words, multirun=False)))


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_what_the_shell_gave(read, name):
    made = read(f"name={name}")
    assert made.name == name
    stored = yaml.safe_load(yaml.safe_dump(asdict(made), sort_keys=False))
    assert config_checks.read(stored).name == name  # as a rank, evaluate and a continued run read it


def test_what_only_the_grammar_can_say_stays(read, monkeypatch):
    monkeypatch.setenv("CITY", "Köln (1)")
    assert read("name='photos (1)'").name == "photos (1)"
    assert read('name="a,b"').name == "a,b"
    assert read("name=null").name is None
    assert read("name=run (${seed})", "seed=3").name == "run (3)"
    assert read("name=${oc.env:CITY}").name == "Köln (1)"
    assert read("name=a\\${seed}").name == "a${seed}"


def test_a_number_may_be_quoted_twice(read):
    assert read("data.batch_size='32'", 'trainer.devices="1"').data.batch_size == 32


def test_a_path_may_be_any_that_exists_and_begin_at_home(read, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a,b", "'q'", "${seed}", "choice(a,b)", "~x"):
        (tmp_path / name).mkdir()
        assert read("data=image_folder", f"data.root={name}").data.root == name
    (tmp_path / "photos (1)").mkdir()
    assert read("data=image_folder", "data.root=~/photos (1)").data.root == str(tmp_path / "photos (1)")
    assert read("runs_dir=~/runs").runs_dir == str(tmp_path / "runs")


def test_of_a_sweep_every_value_is_text():
    assert for_hydra(["name=1e3,b c,'d,e'", "seed=0,1"], multirun=True) == ["name='1e3',b c,'d,e'", "seed=0,1"]
    assert for_hydra(["model.backbone=resnet18,resnet34"], multirun=True) == ["model.backbone=resnet18,resnet34"]
    assert for_hydra(["data.root=ü,ö"], multirun=True) == ["data.root='ü','ö'"]
    assert for_hydra(["data.root=glob(*)", "data.augment=choice(none,light)"], multirun=True) == [
        "data.root=glob(*)",
        "data.augment=choice(none,light)",
    ]
    assert unquoted("'it\\'s'") == "it's"
    assert without_quotes("data.root='ö (1), b'") == "data.root=ö (1), b"
    assert without_quotes("name='null'") == "name='null'"  # null is not the text


@pytest.mark.needs("sweeps")
def test_a_job_of_a_sweep_is_told_by_its_words():
    from src.engine.sweeps.launch import GivenJobs

    jobs = GivenJobs({0: ["data.root='a (1)'", "seed=1"], 1: ["data.root='b (2)'", "seed=1"]})
    assert jobs.params({"job": 1}) == {"data.root": "b (2)"}


def test_other_settings_are_left_to_hydra():
    words = [
        "seed=1",
        "freeze.phases={0:[head]}",
        "data.background=[1,2,3]",
        "data=digits",
        "+new=(",
        "-m",
        "hydra.mode=RUN",
    ]
    assert for_hydra(words, multirun=False) == words
    assert all(map(is_text, ("data.root", "model.backbone", "name", "runs_dir", "logger.project", "trainer.max_time")))
    assert not any(map(is_text, ("seed", "data.batch_size", "freeze.phases", "trainer.devices")))


def test_odd_names_train_and_sweep(command, tmp_path):
    """The run's own files have the name, and the command in them is the one that was typed, not Hydra's."""
    name = "it's (1), ü ${x #2: 100%"
    done = command("train", *SMALL, "debug=true", f"name={name}")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / name
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == name
    assert shlex.split(json.loads((run / "result.json").read_text())["command"])[-1] == f"name={name}"
    assert "is finished already" in command("train", *SMALL, "debug=true", f"name={name}").out
    check_error(command("train", *SMALL, "-m", "name=a (b), ü", "seed=0,1"), 64, "name has several values")
    done = command("train", *SMALL, "debug=true", "-m", "name=a (b) ü", "data.augment=none,light")
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "a (b) ü" / "1" / "result.json").is_file()
