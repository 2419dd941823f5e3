"""What a sweep leaves: files for programs, the ranking on the screen, the command that repeats the winner, failures."""

from __future__ import annotations

import csv
import json
import logging
import re
import shlex

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir

from src.engine.runs.errors import MAX_LINES, ExitCode
from src.engine.sweeps.results import failures, print_ranking, single_run_command, write_results
from src.engine.sweeps.sweep_journal import DIVERGED, FAILED, FINISHED, PAUSED, PRUNED, Goal, Journal, TrialRecord
from tests.conftest import parses


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """Four trials of the sweep runs/heads: #2 was best in its first epoch, #0 pruned, #1 failed, #3 reported nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/heads").mkdir(parents=True)
    journal = Journal(tmp_path / "runs/heads")

    def play(number: int, values: list[float], state: str, error: str = "", **params) -> None:
        params = {name.replace("__", "."): value for name, value in params.items()}
        words = [f"{name}={value}" for name, value in params.items()]
        journal.started(number, f"runs/heads/{number}", params, [*words, "trainer.max_epochs=3"])
        for epoch, value in enumerate(values, start=1):
            journal.row(number, {"epoch": epoch, "val/acc": value, "val/loss": 1 - value})
        journal.ended(number, state, value=values[-1] if state == FINISHED and values else None, error=error)

    play(2, [0.9831, 0.5, 0.75], FINISHED, optimizer__lr=0.00123456, model__head="mlp")
    play(0, [0.25], PRUNED, optimizer__lr=0.1, model__head="linear")
    play(1, [0.99], FAILED, error="ValueError: boom", optimizer__lr=10.0, model__head="mlp")
    play(3, [], PAUSED, optimizer__lr=0.5)
    return journal


def leave_weights(folder):
    path = folder / "runs/heads/2/checkpoints/best.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")


COMMAND = "python -m src.train optimizer.lr=0.00123456 model.head=mlp trainer.max_epochs=3 name=heads-best"


def test_results_name_the_winner(tmp_path, journal):
    leave_weights(tmp_path)
    written = write_results(journal, Goal("val/acc", "max"))
    assert written == yaml.safe_load((tmp_path / "runs/heads/optimization_results.yaml").read_text())
    assert written == {
        "name": "ray_tune",
        "metric": "val/acc",
        "mode": "max",
        "num_trials": 4,
        "num_pruned": 1,
        "num_diverged": 0,
        "num_failed": 1,
        "best_trial": 2,
        "best_value": 0.9831,
        "best_epoch": 1,
        "best_params": {"optimizer.lr": 0.00123456, "model.head": "mlp"},
        "best_overrides": ["optimizer.lr=0.00123456", "model.head=mlp", "trainer.max_epochs=3"],
        "best_folder": "runs/heads/2",
        "best_checkpoint": "runs/heads/2/checkpoints/best.ckpt",
        "command": COMMAND,
    }


def test_results_where_the_smallest_is_best_and_no_weights_are_left(tmp_path, journal):
    written = write_results(journal, Goal("val/loss", "min"))
    assert (written["best_trial"], written["best_epoch"], written["best_checkpoint"]) == (2, 1, None)
    assert write_results(journal, Goal("val/loss", "max"))["best_trial"] == 0


def test_results_without_a_value_name_no_winner(tmp_path, journal):
    written = write_results(Journal(tmp_path), Goal("val/acc", "max"))
    assert list(written) == ["name", "metric", "mode", "num_trials", "num_pruned", "num_diverged", "num_failed"]
    assert written["num_trials"] == 0


def test_the_table_has_a_row_per_trial_in_the_order_of_their_numbers(tmp_path, journal):
    write_results(journal, Goal("val/acc", "max"))
    with (tmp_path / "runs/heads/sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["trial", "state", "optimizer.lr", "model.head", "val/acc", "best_epoch", "epochs", "seconds"]
    assert list(rows[0]) == [*columns, "folder", "error"]
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3"]
    journal.trials[2].seconds = 12.3456
    write_results(journal, Goal("val/acc", "max"))
    with (tmp_path / "runs/heads/sweep.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[3] == ["2", FINISHED, "0.00123456", "mlp", "0.9831", "1", "3", "12.35", "runs/heads/2", ""]
    assert rows[2][1:7] == [FAILED, "10.0", "mlp", "0.99", "1", "1"]
    assert rows[2][-1] == "ValueError: boom"
    assert rows[4][1:7] == [PAUSED, "0.5", "", "", "", ""]


def words_of(*overrides: str, name: str = "heads") -> list[str]:
    command = shlex.split(single_run_command(TrialRecord(0, "runs/heads/0", {}, list(overrides)), name))
    assert command[:3] == ["python", "-m", "src.train"]
    return command[3:]


def test_the_command_of_a_trial_is_without_what_is_of_the_sweep_and_parses():
    words = words_of(
        "data=synthetic",
        "hydra/sweeper=ray_tune",
        "hydra.sweeper.num_samples=4",
        "+hydra.sweeper.params.seed=1,2",
        "name=heads",
        "optimizer.lr=0.001",
        "freeze.phases={0:[head],2:[all]}",
        "logger.project=two words",
    )
    kept = ["data=synthetic", "optimizer.lr=0.001", "freeze.phases={0:[head],2:[all]}", "logger.project=two words"]
    assert words == [*kept, "name=heads-best"]
    assert parses(words)


def test_the_command_of_a_recipe_parses_too():
    words = words_of("experiment=linear_probe", "optimizer.lr=0.002")
    assert words == ["experiment=linear_probe", "optimizer.lr=0.002", "hydra.mode=RUN", "name=heads-best"]
    assert parses(words)


def test_the_command_does_not_begin_the_sweep_of_a_recipe_again(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "config.yaml").write_text("defaults: [{experiment: null}, _self_]\nname: null\nseed: 0\n")
    recipe = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\n"
    (tmp_path / "experiment/tune_seed.yaml").write_text(recipe)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        composed = compose("config", words_of("experiment=tune_seed", "seed=2"), return_hydra_config=True)
    assert (composed.hydra.mode.name, composed.seed, composed.name) == ("RUN", 2, "heads-best")


def printed_ranking(journal, goal):
    print_ranking(journal, goal, write_results(journal, goal))


def test_the_ranking_on_the_screen(tmp_path, journal, caplog):
    leave_weights(tmp_path)
    (journal.path.parent / "report.html").touch()
    caplog.set_level(logging.INFO, "src.engine.sweeps.results")
    printed_ranking(journal, Goal("val/acc", "max"))
    assert caplog.messages == [
        "",
        "rank  trial  lr        head    val/acc           state     folder",
        "1     #2     0.001235  mlp     0.9831 (epoch 1)  finished  runs/heads/2",
        "2     #0     0.1       linear  0.2500 (epoch 1)  pruned    runs/heads/0",
        "4 trials: 1 finished, 1 pruned, 1 failed, 1 paused",
        "",
        "best      runs/heads/2: val/acc 0.9831 (epoch 1)",
        "weights   runs/heads/2/checkpoints/best.ckpt",
        "look at   runs/heads/report.html",
        "files     runs/heads/: optimization_results.yaml, sweep.csv, trials.jsonl",
        f"repeat    {COMMAND}",
    ], "and of #1, which failed, nothing: the error that ends the sweep says it"


def test_the_best_of_many_trials_is_said_to_be_lucky(tmp_path, journal, caplog):
    caplog.set_level("INFO")
    for number in range(4, 22):
        journal.started(number, f"runs/heads/{number}", {}, [])
        journal.row(number, {"epoch": 1, "val/acc": 0.5})
    (tmp_path / "runs/heads/2").mkdir()
    result = {"intervals": {"val/acc": [0.90, 0.9784]}}  # a standard deviation of 0.02
    (tmp_path / "runs/heads/2/result.json").write_text(json.dumps(result))
    printed_ranking(journal, Goal("val/acc", "max"))
    draws = np.random.default_rng(0).normal(0, 0.02, (20000, 20)).max(1).mean()
    line = next(line for line in caplog.messages if line.startswith("luck"))
    assert "of 20 equally good trials" in line
    assert float(re.search(r"about ([\d.]+)", line)[1]) == pytest.approx(draws, rel=0.03)
    assert not any(line.startswith("val ") for line in caplog.messages), "the others are far worse"
    for number in (4, 9):
        journal.row(number, {"epoch": 2, "val/acc": 0.97})
    journal.row(5, {"epoch": 2, "val/acc": 0.96})
    printed_ranking(journal, Goal("val/acc", "max"))
    assert "val       cannot tell the best 3 of 20 trials apart (±0.020)" in caplog.messages
    noted = yaml.safe_load((tmp_path / "runs/heads/optimization_results.yaml").read_text())["val_ties"]
    assert noted == {"trials": [2, 4, 9], "standard_error": pytest.approx(0.02)}


def test_the_ranking_shows_ten_and_counts_all(tmp_path, caplog):
    caplog.set_level(logging.INFO, "src.engine.sweeps.results")
    journal = Journal(tmp_path)
    for number in range(30):
        journal.started(number, f"runs/x/{number}", {}, [])
        journal.ended(number, FINISHED, value=float(number))
    printed_ranking(journal, Goal("val/acc", "max"))
    assert [line.split()[1] for line in caplog.messages[2:12]] == [f"#{number}" for number in range(29, 19, -1)]
    assert caplog.messages[2].split() == ["1", "#29", "29.0000", FINISHED, "runs/x/29"]
    assert caplog.messages[12] == "30 trials: 30 finished"


def test_a_sweep_without_a_value_says_so(journal, caplog):
    caplog.set_level(logging.INFO, "src.engine.sweeps.results")
    printed_ranking(journal, Goal("val/f1", "max"))
    printed = "\n".join(caplog.messages)
    assert "best      no trial has a value of val/f1" in printed
    assert "repeat" not in printed
    journal.ended(1, DIVERGED, error="the loss is nan")
    printed_ranking(journal, Goal("val/f1", "max"))
    assert caplog.messages[-1] == "diverged  #1 the loss is nan (runs/heads/1)"


def test_failures_are_an_error_that_lists_them(journal):
    error = failures(journal)
    assert error.code == ExitCode.TRIALS_FAILED == 1
    text = error.render()
    assert "1 of 4 trials failed" in text
    assert f"where   {journal.path.parent}" in text
    assert "#1 ValueError: boom (runs/heads/1)" in text
    assert "fix     python -m src.train name=heads # tries only these again" in text


def test_many_failures_leave_room_for_what_to_do(tmp_path):
    journal = Journal(tmp_path)
    for number in range(20):
        journal.started(number, f"a/rather/long/path/to/the/folder/of/the/sweep/{number}", {}, [])
        journal.ended(number, FAILED, error="ValueError: " + "a long story of what went wrong " * 20)
    lines = failures(journal).render(tmp_path / "error.log").splitlines()
    assert len(lines) <= MAX_LINES
    assert sum("ValueError: a long story" in line and "/sweep/" in line for line in lines) == 8
    assert lines[-3].strip() == "and 12 more"
    assert lines[-2].endswith("# tries only these again")


def test_no_failures_are_no_error(tmp_path):
    journal = Journal(tmp_path)
    journal.started(0, "runs/x/0", {}, [])
    journal.ended(0, PRUNED)
    assert failures(journal) is None
