"""What a trial tells Tune of its rows and of its end, without Ray: schedulers and searches compare only finite numbers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from omegaconf import OmegaConf
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from src.engine.runs.errors import ErrorOfProcess, ExitCode, UserError
from src.engine.sweeps import trainable
from src.engine.sweeps.controller import Watcher
from src.engine.sweeps.jobs import CONFIG
from src.engine.sweeps.sweep_journal import DIVERGED, FAILED, PAUSED, Goal, Journal
from src.engine.sweeps.trainable import HydraTrainable

HIGH, LOW = Goal("val/acc", "max"), Goal("val/loss", "min")


def trial(goal: Goal, **job: Any) -> HydraTrainable:
    """With a job that is over."""
    made = HydraTrainable.__new__(HydraTrainable)
    made.context = SimpleNamespace(goal=goal, changes_points=False, folder=lambda number: Path("no", "such", "folder"))
    made.job = SimpleNamespace(**{"interrupted": False, "error": None, "value": None} | job)
    made._trial_info = SimpleNamespace(trial_id="4")
    made.last, made.peers = {}, []
    return made


@pytest.mark.parametrize("goal", [HIGH, LOW])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_is_the_worst_to_tune_and_itself_to_people(goal, value):
    one = trial(goal)
    row = {goal.metric: value, "train/loss": math.nan, "epoch": 2}
    told = one._reported(row)
    assert told[goal.metric] == goal.worst
    assert told["epoch"] == 2
    assert told[trainable.ROW] is row
    assert one._reported(row | {goal.metric: 0.5})[goal.metric] == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "a text"])
def test_a_job_that_returns_no_number_counts_as_the_worst(value):
    told = trial(HIGH, value=value)._ended()
    assert told[HIGH.metric] == HIGH.worst
    assert told["done"]


def test_a_trial_that_an_earlier_start_has_trained_ends_with_its_last_epoch(tmp_path):
    """Median leaves out whom it knows of with a smaller one."""
    (tmp_path / "metrics.csv").write_text(f"epoch,{HIGH.metric}\n1,0.5\n2,0.7\n")
    one = trial(HIGH, value=0.7)
    one.context.folder = lambda number: tmp_path
    told = one._ended()
    assert (told["epoch"], told[HIGH.metric]) == (2, 0.7)


@pytest.mark.parametrize("kind", [UserError, ErrorOfProcess])
def test_a_trial_that_diverged_is_the_worst_and_no_failure(kind):
    error = kind("the loss is nan", code=ExitCode.DIVERGED)
    one = trial(LOW, error=error)
    one._reported({"val/loss": 0.1, "epoch": 3})
    told = one._ended()
    assert (told["val/loss"], told["epoch"], told["done"]) == (LOW.worst, 3, True)
    assert (told[trainable.STATE], told[trainable.ERROR]) == (DIVERGED, "the loss is nan")
    other = trial(LOW, error=kind("the disk is full", code=ExitCode.CANNOT_WRITE))._ended()
    assert (other[trainable.STATE], other[trainable.ERROR]) == (FAILED, "the disk is full")


def test_a_trial_that_is_interrupted_before_its_first_epoch_has_an_epoch_and_can_be_saved(monkeypatch):
    """Schedulers read the epoch of every result, and Tune may ask for a checkpoint although the job is over."""
    one = trial(HIGH, interrupted=True)
    told = one._ended()
    assert (told["epoch"], told[HIGH.metric], told[trainable.STATE]) == (0, HIGH.worst, PAUSED)
    kept = []
    monkeypatch.setattr(trainable, "keep_checkpoints", lambda *arguments: kept.append(arguments))
    one.config = {CONFIG: cloudpickle.dumps(OmegaConf.create({"hydra": {"overrides": {"task": ["seed=1"]}}}))}
    one.save_checkpoint("there")
    assert kept[0][2:] == (4, ["seed=1"])


def test_a_trial_of_nan_is_stopped_by_asha():
    """nan itself is never below a cutoff: the control."""

    def decision(told: float) -> str:
        scheduler = ASHAScheduler(time_attr="epoch", max_t=9, grace_period=1, reduction_factor=3)
        scheduler.set_search_properties(HIGH.metric, HIGH.mode)
        for number, value in enumerate((0.5, 0.6, 0.7, told)):
            one = Trial("", stub=True, trial_id=str(number))
            scheduler.on_trial_add(None, one)
            last = scheduler.on_trial_result(None, one, {HIGH.metric: value, "epoch": 1})
        return last

    row = {HIGH.metric: math.nan, "epoch": 1}
    assert decision(trial(HIGH)._reported(row)[HIGH.metric]) == TrialScheduler.STOP
    assert decision(math.nan) == TrialScheduler.CONTINUE


@pytest.mark.parametrize(("value", "copied"), [(0.7222222, 0), (0.7222, 1)])
def test_only_rows_of_another_trial_are_copied_into_the_journal(tmp_path, value, copied):
    """The rows of metrics.csv, which a worker reads before it goes on, have fewer digits than the journal's."""
    journal = Journal(tmp_path)
    journal.started(4, "runs/x/4", {}, [])
    journal.row(4, {"epoch": 1, HIGH.metric: 0.7222222089767456})
    context, settings = SimpleNamespace(goal=HIGH), SimpleNamespace(time_budget_s=None)
    watcher = Watcher(context, settings, SimpleNamespace(journal=journal), None, 9)
    result = {trainable.HISTORY: [{"epoch": 1.0, HIGH.metric: value}]}
    watcher.on_trial_result(SimpleNamespace(trial_id="4"), result)
    assert journal.path.read_text().count("copied") == copied
