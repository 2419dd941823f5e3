"""What a sweep reads from the config of a job."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, PopulationBasedTraining

from src.errors import UserError
from src.reporting.goal import Goal
from src.tuning import judging
from src.tuning.settings import LauncherSettings


def test_the_folder_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "runs/x", "subdir": judging.SUBDIR}}})
    assert judging.folder_of_sweep(config) == tmp_path / "runs" / "x"


def test_folders_that_are_not_numbered_are_refused():
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "runs", "subdir": "${hydra.job.override_dirname}"}}})
    with pytest.raises(UserError, match=r"hydra.sweep.subdir=\$\{hydra.job.override_dirname\} has no effect"):
        judging.folder_of_sweep(config)


@pytest.mark.parametrize(
    ("asked", "config", "judged"),
    [
        ({}, {"checkpoint": {"monitor": "val/balanced_acc"}}, Goal("val/balanced_acc", "max")),
        ({}, {"checkpoint": {"monitor": "val/loss"}}, Goal("val/loss", "min")),
        ({"metric": "val/loss"}, {"checkpoint": {"monitor": "val/acc"}}, Goal("val/loss", "min")),
        ({}, {}, Goal("objective", "max")),
        ({"mode": "min"}, {}, Goal("objective", "min")),
        ({"metric": "test_error"}, {}, Goal("test_error", "min")),
        ({"metric": "train_loss", "mode": "max"}, {}, Goal("train_loss", "max")),
    ],
)
def test_by_what_trials_are_judged(asked, config, judged):
    assert judging.goal_of(LauncherSettings(**asked), OmegaConf.create(config)) == judged


def test_a_mode_that_is_none():
    with pytest.raises(UserError, match="mode=up is not a choice"):
        judging.goal_of(LauncherSettings(mode="up"), OmegaConf.create({}))


def test_how_long_a_job_is():
    assert judging.max_epochs_of(OmegaConf.create({"trainer": {"max_epochs": 7}})) == 7
    assert judging.max_epochs_of(OmegaConf.create({})) == 100


@pytest.mark.parametrize(
    ("scheduler", "keeps"),
    [
        (None, False),
        (ASHAScheduler(), False),
        (HyperBandScheduler(), True),
        (PopulationBasedTraining(hyperparam_mutations={"lr": [1, 2]}), True),
    ],
)
def test_which_schedulers_need_checkpoints(scheduler, keeps):
    assert judging.keeps_checkpoints(scheduler) is keeps


def test_a_job_is_checked_before_it_is_sent_if_it_knows_how():
    """It gets what it would get as a job: without hydra."""
    checked = []

    def task(config): ...

    config = OmegaConf.create({"lr": 1, "hydra": {"job": {}}})
    judging.check_job(task, config)
    task.check = checked.append
    judging.check_job(task, config)
    assert checked == [{"lr": 1}]
