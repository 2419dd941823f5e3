"""From names to searches and schedulers, and what is refused: with the reason, and a sweep that works instead."""

from __future__ import annotations

import importlib.util
import random

import numpy as np
import pytest
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pbt import _explore

from src.engine.runs.errors import UserError
from src.engine.sweeps import searches
from src.engine.sweeps.schedulers import build_scheduler, keeps_checkpoints
from src.engine.sweeps.searches import build_search, random_point
from src.engine.sweeps.settings import LauncherSettings, SweeperSettings
from src.engine.sweeps.sweep_journal import Goal
from tests.engine.sweeps.test_search_points import Told
from tests.engine.sweeps.test_space import check_sweep_error, space_of

LR, GOAL = "optimizer.lr=tag(log,interval(1e-5,1e-1))", Goal("val/acc", "max")


def search_for(search, *words: str, seed: int = 0):
    return build_search(search, space_of(*words or [LR]), GOAL, seed)


def scheduler_for(scheduler, *words: str, max_epochs: int = 12, **settings):
    space = space_of(*words or [LR])
    return build_scheduler(SweeperSettings(scheduler=scheduler, **settings), space, GOAL, max_epochs)


def check_refused(build, *culprits: str) -> UserError:
    with pytest.raises(UserError) as caught:
        build()
    check_sweep_error(caught.value, *culprits)
    return caught.value


def test_random_and_grid_are_ours():
    assert next(search_for("random", seed=3)) == random_point(space_of(LR), 3, "trial", 0)
    assert list(search_for("grid", "seed=1,2")) == [{"seed": 1}, {"seed": 2}]


def test_optuna_searches_the_space_and_follows_from_the_seed():
    optuna = pytest.importorskip("optuna")
    words = [LR, "model.head=linear,mlp", "seed=range(0,8,4)", "freeze.last_n=int(interval(1,3))"]
    words += ["freeze.phases={0:[head]},{0:[all]}", "model.dropout=interval(0,0.5)"]
    space = space_of(*words)
    found = [[search_for("optuna", *words, seed=seed).suggest(str(seed)) for _ in range(2)] for seed in (0, 1)]
    assert found[0][0] == found[0][1] != found[1][0]
    search = search_for("optuna", *words)
    assert (search.metric, search.mode) == ("val/acc", "max")
    for number in range(30):
        point = search.suggest(str(number))
        assert space.contains(point)
        search.on_trial_complete(str(number), {"val/acc": point["model.dropout"]})
    assert point["model.dropout"] > 0.3, "TPE goes where it is better"  # optuna 4.5: 0.33
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


def test_a_name_that_does_not_exist_is_answered_with_the_closest():
    check_refused(
        lambda: search_for("optina"), "search=optina", "did you mean optuna", "random, grid, optuna, bayesopt"
    )
    check_refused(lambda: search_for("xyz"), "search=xyz is not a choice")
    check_refused(lambda: scheduler_for("ashaa"), "did you mean asha", "none, asha, median, hyperband, pbt")
    check_refused(lambda: scheduler_for(None), "scheduler=None")


def test_a_search_of_rays_gets_metric_mode_and_space():
    pytest.importorskip("optuna")
    entry = {"_target_": "ray.tune.search.optuna.OptunaSearch", "seed": 1}
    search = search_for(entry, LR, "model.head=linear,mlp")
    assert (search.metric, search.mode) == ("val/acc", "max")
    assert set(search.suggest("x")) == {"optimizer.lr", "model.head"}
    assert search_for(entry | {"metric": "val/loss", "mode": "min"}).mode == "max", "the sweep's, not another"


@pytest.fixture
def own_search(monkeypatch) -> dict:
    """The entry of a search that stands in this project."""
    monkeypatch.setattr(searches, "Own", type("Own", (Told,), {"__module__": searches.__name__}), raising=False)
    return {"_target_": f"{searches.__name__}.Own"}


def test_a_search_of_this_project_gets_metric_mode_and_space(own_search):
    space = space_of(LR)
    assert build_search(own_search, space, GOAL, 0).properties == ("val/acc", "max", space.domains, {})


@pytest.mark.parametrize(
    "target",
    [
        "ray.tune.search.searcher.os.system",
        "ray.tune.search.optuna.optuna_search.pickle.loads",
        "ray.tune.search.optuna.optuna_search.version.Version",
        "ray.tune.schedulers.FIFOScheduler",
        "ray.tune.search.nowhere.Search",
        "os.system",
        "builtins.eval",
        "src.engine.runs.errors.UserError",
        "tests.engine.sweeps.test_search_points.Told",
        None,
        7,
    ],
)
def test_nothing_but_a_search_is_ever_called(target):
    error = check_refused(lambda: search_for({"_target_": target}), f"search: {target} cannot be used")
    assert error.why.startswith(("a search is a class below ray.tune.search.", "it cannot be imported")), (
        "it was called"
    )


def test_a_class_from_elsewhere_is_refused_wherever_it_can_be_reached(monkeypatch):
    """`import` puts it below src. by name, but not by where it is from."""
    monkeypatch.setattr(searches, "Told", Told, raising=False)
    check_refused(
        lambda: search_for({"_target_": "src.engine.sweeps.searches.Told"}), "src.engine.sweeps.searches.Told"
    )


def test_a_class_that_cannot_be_made_says_why(own_search):
    rays = "ray.tune.search.hyperopt.HyperOptSearch"
    check_refused(lambda: search_for(own_search | {"sead": 1}), "sead")
    if importlib.util.find_spec("hyperopt") is None:
        check_refused(lambda: search_for({"_target_": rays}), "hyperopt", "installed")
    check_refused(lambda: scheduler_for({"_target_": "ray.tune.schedulers.ASHAScheduler", "max_t": -1}), "max_t")


def test_schedulers_count_epochs():
    assert scheduler_for("none") is None
    asha = scheduler_for("asha", grace_epochs=2, reduction_factor=4, max_epochs=32)
    assert type(asha) is ASHAScheduler
    (bracket,) = asha._brackets
    assert [epoch for epoch, _ in bracket._rungs] == [32, 8, 2]
    assert (asha._time_attr, asha._max_t) == ("epoch", 33), "a trial that reaches max_t counts as stopped"
    median = scheduler_for("median", grace_epochs=3)
    assert type(median) is MedianStoppingRule
    assert (median._time_attr, median._grace_period) == ("epoch", 3)
    hyperband = scheduler_for("hyperband", reduction_factor=2, grace_epochs=50)
    assert type(hyperband) is HyperBandScheduler
    assert (hyperband._time_attr, hyperband._max_t_attr, hyperband._eta) == ("epoch", 13, 2)


def test_every_scheduler_has_the_metric_of_the_sweep_and_no_other():
    for name in ("asha", "median", "hyperband", "pbt"):
        assert scheduler_for(name).metric == "val/acc"
    own = {"_target_": "ray.tune.schedulers.ASHAScheduler", "metric": "val/loss", "mode": "min"}
    check_refused(lambda: scheduler_for(own), "metric and mode are those of the sweep")


def test_the_launcher_has_schedulers_too_but_not_pbt():
    assert isinstance(build_scheduler(LauncherSettings(scheduler="asha"), None, GOAL, 12), ASHAScheduler)
    check_refused(lambda: build_scheduler(LauncherSettings(scheduler="pbt"), None, GOAL, 12), "pbt needs the sweeper")


def test_a_scheduler_of_rays():
    made = scheduler_for({"_target_": "ray.tune.schedulers.ASHAScheduler", "time_attr": "epoch", "grace_period": 5})
    assert made._time_attr == "epoch"
    assert isinstance(scheduler_for({"_target_": "ray.tune.schedulers.FIFOScheduler"}), FIFOScheduler)
    for target in ("ray.tune.schedulers.pbt.os.remove", "ray.tune.schedulers.pbt.Trial", "ray.tune.search.Repeater"):
        check_refused(lambda target=target: scheduler_for({"_target_": target}), target, TrialScheduler.__name__)


@pytest.mark.parametrize("name", ["asha", "median", "pbt"])
def test_a_grace_that_spares_every_trial_is_refused(name):
    check_refused(lambda: scheduler_for(name, grace_epochs=12), "grace_epochs=12", "no trial could ever be stopped")
    check_refused(lambda: scheduler_for(name, grace_epochs=0), "grace_epochs=0 is below 1")
    assert scheduler_for(name, grace_epochs=11)
    assert scheduler_for("none", grace_epochs=12) is None


@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_a_factor_that_stops_nothing_is_refused(name):
    check_refused(lambda: scheduler_for(name, reduction_factor=1), "reduction_factor=1 stops no trial")


def test_pbt_changes_what_can_change_in_a_run():
    words = [LR, "optimizer.weight_decay=0,0.01", "model.dropout=interval(0,0.5)", "data.augment=light,strong"]
    pbt = scheduler_for("pbt", *words, "model.label_smoothing=interval(0,0.2)", grace_epochs=3)
    assert isinstance(pbt, PopulationBasedTraining)
    assert (pbt._time_attr, pbt._perturbation_interval, pbt._synch) == ("epoch", 3, False)
    for word in ("optimizer.name=sgd,adamw", "optimizer.schedule=cosine,constant", "model.head=linear,mlp", "seed=1,2"):
        check_refused(lambda word=word: scheduler_for("pbt", LR, word), word.partition("=")[0])
    error = check_refused(lambda: scheduler_for("pbt", LR, "seed=1,2", "optimizer=adamw,sgd"), "seed, optimizer")
    assert "optimizer.lr" not in error.found


def test_pbt_stays_inside_the_space_and_follows_from_the_seed():
    words = [LR, "model.dropout=interval(0,0.5)", "data.augment=none,light,strong"]
    space = space_of(*words)

    def changes(seed: int) -> list:
        pbt = scheduler_for("pbt", *words, seed=seed)
        point = {"optimizer.lr": 0.09, "model.dropout": 0.45, "data.augment": "strong", "job": 1}
        found = []
        for _ in range(40):
            point, _ = _explore(point, pbt._hyperparam_mutations, 0.25, (1.2, 0.8), pbt._custom_explore_fn)
            found.append(point)
        return found

    found = changes(0)
    assert all(space.contains(point) for point in found)
    assert any(point["optimizer.lr"] == 0.1 for point in found), "never at the end: is this test too weak?"
    assert all(point["job"] == 1 for point in found)
    random.seed(7)
    np.random.seed(7)
    assert changes(0) == found != changes(1)


@pytest.mark.parametrize(
    "pbt", ["pbt", {"_target_": "ray.tune.schedulers.PopulationBasedTraining", "hyperparam_mutations": {"a": [1, 2]}}]
)
def test_pbt_takes_no_search(pbt):
    assert isinstance(scheduler_for(pbt, search="random"), PopulationBasedTraining)
    for search in ("optuna", "grid", {"_target_": "ray.tune.search.optuna.OptunaSearch"}):
        check_refused(lambda search=search: scheduler_for(pbt, search=search), "does not go with scheduler=")
    for other in ("asha", "none", {"_target_": "ray.tune.schedulers.ASHAScheduler"}):
        scheduler_for(other, search="optuna")


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
    assert keeps_checkpoints(scheduler) is keeps
