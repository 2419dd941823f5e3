"""The jobs of a sweep on the driver: composed as Hydra composes them, checked, and packed for a worker."""

from __future__ import annotations

from types import SimpleNamespace

import cloudpickle
import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf

from src.engine.runs.errors import UserError
from src.engine.sweeps import jobs, settings
from src.engine.sweeps.settings import LauncherSettings
from src.engine.sweeps.sweep_journal import Goal
from tests.warm import ROOT


def hydra_of(sweep: dict, task=None) -> jobs.HydraSweep:
    return jobs.HydraSweep(SimpleNamespace(), task, OmegaConf.create({"hydra": {"sweep": sweep}}))


def test_the_folder_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hydra_of({"dir": "runs/x", "subdir": jobs.SUBDIR}).folder == tmp_path / "runs" / "x"


def test_folders_that_are_not_numbered_are_refused():
    with pytest.raises(UserError, match=r"hydra.sweep.subdir=\$\{hydra.job.override_dirname\} has no effect"):
        _ = hydra_of({"dir": "runs", "subdir": "${hydra.job.override_dirname}"}).folder


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
    assert jobs.goal_of(LauncherSettings(**asked), OmegaConf.create(config)) == judged


def test_a_mode_that_is_none():
    with pytest.raises(UserError, match="mode=up is not a choice"):
        jobs.goal_of(LauncherSettings(mode="up"), OmegaConf.create({}))


def test_how_long_a_job_is():
    short, long, auto = (OmegaConf.create({"trainer": {"max_epochs": epochs}}) for epochs in (3, 7, "auto"))
    assert jobs.most_epochs([short, long]) == 7
    assert jobs.most_epochs([short, auto]) is None
    assert jobs.most_epochs([OmegaConf.create({})]) == 100


def test_a_job_is_checked_before_it_is_sent_if_it_knows_how():
    """It gets what it would get as a job: without hydra."""
    checked = []

    def task(config): ...

    config = OmegaConf.create({"lr": 1, "hydra": {"job": {}}})
    hydra_of({}, task).check(config)
    task.check = checked.append
    hydra_of({}, task).check(config)
    assert checked == [{"lr": 1}]


@pytest.fixture
def hydra(tmp_path) -> jobs.HydraSweep:
    """What the plugins get of a sweep of this project."""
    settings.register()
    OmegaConf.register_new_resolver("sweep_name", lambda name, _: name or "new", replace=True)
    OmegaConf.register_new_resolver("of_the_program", lambda: "resolved", replace=True)
    setup_globals()
    words = ["hydra/launcher=ray_tune", "hydra.job.name=mine", f"hydra.sweep.dir={tmp_path}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        whole = loader.load_configuration("train", words, run_mode=RunMode.MULTIRUN)
        yield jobs.HydraSweep(HydraContext(loader, callbacks=None), None, whole)


def test_the_config_of_a_job_is_hydras_own(hydra, tmp_path):
    composed = hydra.compose(["optimizer.lr=0.5", "model=vgg19_append"], 3)
    assert composed.optimizer.lr == 0.5
    assert composed.model.backbone == "vgg19"
    assert composed.hydra.job.num == 3
    assert composed.hydra.job.id == "mine_3"
    assert composed.hydra.runtime.choices["hydra/launcher"] == "ray_tune"
    assert composed.hydra.sweep.dir == str(tmp_path)
    assert "optimizer.lr=0.5" in composed.hydra.overrides.task
    assert hydra.compose([], 4).optimizer.lr != 0.5, "a job sees what another one said"


def test_a_packed_config_has_its_types_and_needs_no_resolver_of_the_program(hydra, tmp_path):
    words = ["name=${of_the_program:}", "runs_dir=${hydra:runtime.output_dir}", "data.root=${hydra.job.id}"]
    before = HydraConfig.instance().cfg
    composed = hydra.compose(words, 3)
    packed = jobs.packed(composed)
    assert HydraConfig.instance().cfg is before
    OmegaConf.clear_resolver("of_the_program")
    unpacked = cloudpickle.loads(packed)
    assert (unpacked.name, unpacked.runs_dir, unpacked.data.root) == ("resolved", str(tmp_path / "3"), "mine_3")
    assert unpacked.hydra.sweep.subdir == "3"
    assert OmegaConf.get_type(unpacked.optimizer) is OmegaConf.get_type(composed.optimizer)
    assert OmegaConf.to_container(composed, resolve=False)["name"] == "${of_the_program:}", "sweep.json compares it"


def test_a_mistyped_setting_is_refused(hydra):
    with pytest.raises(HydraException, match="lrr"):
        hydra.compose(["optimizer.lrr=0.5"])
