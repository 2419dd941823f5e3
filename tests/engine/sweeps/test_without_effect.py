"""Settings of a sweep that nothing reads are named, and no others."""

from __future__ import annotations

import logging

import pytest

from src.engine.sweeps.settings import LauncherSettings, Ray, RayInit, SweeperSettings, warn_without_effect

CLUSTER = RayInit(address="10.0.0.1:6379", num_cpus=4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (SweeperSettings(), []),
        (SweeperSettings(scheduler="none", grace_epochs=3, reduction_factor=3), []),
        (SweeperSettings(scheduler="none", grace_epochs=2, reduction_factor=4), ["grace_epochs", "reduction_factor"]),
        (SweeperSettings(scheduler="asha", grace_epochs=2, reduction_factor=4), []),
        (SweeperSettings(scheduler="median", grace_epochs=2, reduction_factor=4), ["reduction_factor"]),
        (SweeperSettings(scheduler="pbt", grace_epochs=2, reduction_factor=4), ["reduction_factor"]),
        (SweeperSettings(scheduler="hyperband", grace_epochs=2, reduction_factor=4), ["grace_epochs"]),
        (
            LauncherSettings(scheduler={"_target_": "ray.tune.schedulers.ASHAScheduler"}, grace_epochs=2),
            ["grace_epochs"],
        ),
        (SweeperSettings(search="grid", num_samples=9), ["num_samples"]),
        (SweeperSettings(search="grid", num_samples=-1), []),
        (SweeperSettings(search="optuna", num_samples=9), []),
        (LauncherSettings(ray=Ray(ship_code=True)), ["ray.ship_code"]),
        (LauncherSettings(ray=Ray(init=RayInit(num_cpus=4))), []),
        (LauncherSettings(ray=Ray(init=CLUSTER, ship_code=True)), ["ray.init.num_cpus"]),
    ],
    ids=str,
)
def test_what_nothing_reads_is_named(settings, named, caplog):
    warn_without_effect(settings)
    keys = [message.partition("=")[0].split(".", 2)[2] for message in caplog.messages]
    assert sorted(keys) == named


def test_it_is_said_as_it_was_typed(caplog):
    with caplog.at_level(logging.WARNING):
        warn_without_effect(SweeperSettings(scheduler="hyperband", grace_epochs=2))
        warn_without_effect(LauncherSettings(ray=Ray(init=CLUSTER)))
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "hydra.sweeper.grace_epochs=2 has no effect: it is for scheduler=asha and median and pbt, and scheduler is hyperband"
    )
    assert second.startswith("hydra.launcher.ray.init.num_cpus=4 has no effect: a cluster's machines say themselves")
