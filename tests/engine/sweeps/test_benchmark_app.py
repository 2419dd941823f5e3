"""The app of scripts/benchmarks/sweeps.py: it finds the project's launcher, and its training listens to the sweep."""

from __future__ import annotations

import subprocess
import sys

import pytest

from src.engine.sweeps.trial import FINISH, GO_ON, Trial, working_on
from tests.conftest import ROOT, command_environment


@pytest.mark.parametrize("plugin", ["launcher", "sweeper"])
def test_the_app_finds_the_plugins_of_the_project(plugin: str) -> None:
    words = ["-m", "scripts.benchmarks.sweep_app.app", f"hydra/{plugin}=ray_tune", "--cfg", "hydra"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=command_environment(), capture_output=True, text=True, timeout=60
    )
    assert f"_target_: hydra_plugins.ray_tune.RayTune{plugin.capitalize()}" in done.stdout, done.stderr


def test_the_training_reports_every_epoch_and_ends_when_it_is_told_to() -> None:
    from scripts.benchmarks.sweep_app.training import train

    trial = Trial()
    for answer in (GO_ON, FINISH):
        trial.answer(answer)
    with working_on(trial):
        accuracy = train(lr=0.3, epochs=5)
    trial.over()
    first, second, end = (trial.next_row(1) for _ in range(3))
    assert (first["epoch"], second["epoch"], end) == (1, 2, {})
    assert 0.25 < first["objective"] < second["objective"] == accuracy, (
        "better than chance, and better with every epoch"
    )
