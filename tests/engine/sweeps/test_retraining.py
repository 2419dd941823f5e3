"""retrain=true: which run it is, what the sweep says of it, and how it ends."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from src.engine import features
from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps.results import conclude
from src.engine.sweeps.retraining import LARGEST_SEED, Retraining
from src.engine.sweeps.sweep_journal import FINISHED, Goal, Journal
from tests.conftest import check_error, parses

GOAL = Goal("val/acc", "max")


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """runs/heads with trial 0 and the winner, trial 1."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/heads").mkdir(parents=True)
    journal = Journal(tmp_path / "runs/heads")
    for number, value in enumerate((0.5, 0.75)):
        write_trial(journal, number, value, {"optimizer.lr": 0.1})
    return journal


def write_trial(journal: Journal, number: int, value: float, params: dict, **data) -> None:
    folder = Path(f"runs/heads/{number}")
    folder.mkdir(parents=True)
    words = ["data=synthetic", "hydra.sweeper.num_samples=2", "name=heads", *(f"{k}={v}" for k, v in params.items())]
    seed = params.get("seed", 3)
    settings = {"seed": seed, "runs_dir": "runs", "data": {"split_seed": None, "split_file": None} | data}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "result.json").write_text(
        json.dumps({"state": "finished", "metrics": {"val/acc": value, "test/acc": 0.7}})
    )
    journal.started(number, str(folder), params, words)
    journal.row(number, {"epoch": 1, "val/acc": value})
    journal.ended(number, FINISHED, value=value)


def test_it_has_the_winners_settings_and_split_and_another_seed(journal):
    retraining = Retraining.of(journal, GOAL)
    words = ["data=synthetic", "optimizer.lr=0.1", "seed=4", "data.split_seed=3", "name=heads/retrained_1_seed_4"]
    assert retraining.words == words
    assert parses(words)
    assert retraining.folder == Path("runs/heads/retrained_1_seed_4")


def test_the_seed_is_no_trials_and_the_split_the_winners_where_seeds_are_swept(journal):
    write_trial(journal, 2, 0.9, {"seed": 5})
    write_trial(journal, 3, 0.1, {"seed": 8})
    retraining = Retraining.of(journal, GOAL)
    assert retraining.words == ["data=synthetic", "seed=9", "data.split_seed=5", "name=heads/retrained_2_seed_9"]
    write_trial(journal, 4, 0.95, {"seed": LARGEST_SEED, "data.split_seed": 7}, split_seed=7)
    assert Retraining.of(journal, GOAL).words[1:3] == ["seed=0", "data.split_seed=7"]
    write_trial(journal, 5, 0.99, {"data.split_file": "a.csv"}, split_file="a.csv")
    assert not any(word.startswith("data.split_seed") for word in Retraining.of(journal, GOAL).words)


def test_the_summary_says_what_it_measured(journal, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "src.engine.sweeps.results")
    trained: list[Path] = []

    def train(retraining: Retraining, sweep: str) -> None:
        assert sweep == "heads"
        trained.append(retraining.folder)
        retraining.folder.mkdir()
        result = {
            "state": "finished",
            "metrics": {"val/acc": 0.5, "test/acc": 0.625},
            "intervals": {"test/acc": (0.6, 0.65)},
        }
        (retraining.folder / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr(Retraining, "run", train)
    conclude(journal, GOAL, retrain=False)
    assert not trained
    assert "retrained" not in yaml.safe_load(Path("runs/heads/optimization_results.yaml").read_text())
    for _ in range(2):
        conclude(journal, GOAL, retrain=True)
        assert caplog.messages[-2:] == [
            "winner    runs/heads/1: val/acc 0.7500, test/acc 0.7000",
            "retrained runs/heads/retrained_1_seed_4: val/acc 0.5000, test/acc 0.6250 (0.600 to 0.650)",
        ]
        noted = yaml.safe_load(Path("runs/heads/optimization_results.yaml").read_text())["retrained"]
        assert (noted["seed"], noted["metrics"]["test/acc"]) == (4, 0.625)
    assert len(trained) == 1, "the second time it is there"
    if "sweep_reports" in features.names():
        assert "runs/heads/retrained_1_seed_4" in Path("runs/heads/report.html").read_text()


def test_where_it_is_off_its_command_is_shown(journal, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "src.engine.sweeps.results")
    typed = "python -m src.train -m hydra/launcher=ray_tune optimizer.lr=0.1,0.2"
    monkeypatch.setenv("TRAIN_COMMAND", typed)
    conclude(journal, GOAL, retrain=False)
    assert caplog.messages[-1] == f"retrain   {typed} name=heads hydra.launcher.retrain=true"
    conclude(journal, GOAL)
    assert not caplog.messages[-1].startswith("retrain"), "other batches may follow"


@pytest.mark.parametrize("content", [None, "data: [", "data: {}"])
def test_trials_that_are_no_runs_are_not_trained_again(content, journal, caplog):
    file = Path("runs/heads/1/config.yaml")
    file.unlink() if content is None else file.write_text(content)
    assert Retraining.of(journal, GOAL) is None
    conclude(journal, GOAL, retrain=True)
    assert "retrain=true has no effect" in caplog.text


def test_one_that_fails_ends_the_sweep_with_its_code(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    retraining = Retraining(Path("runs/heads/retrained"), 4, ["optimizer.lr=-1"])
    with pytest.raises(UserError, match="the retraining of the winner ended with exit code 64") as caught:
        retraining.run("heads")
    assert caught.value.code == ExitCode.CONFIG == 64
    assert "optimizer.lr=-1" in capfd.readouterr().err


def test_a_sweeper_with_batches_is_refused(command):
    words = ("hydra/launcher=ray_tune", "hydra.launcher.retrain=true", "hydra.sweeper.max_batch_size=1", "seed=0,1")
    done = command("train", "-m", *words, "data=synthetic")
    check_error(done, 64, "retrain=true has no effect", "which batch is the last")
