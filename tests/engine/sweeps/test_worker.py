"""What a worker is used for again, and what ends it: real trials of a small Hydra application."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from src.engine.sweeps.sweep_journal import DIVERGED, FAILED, FINISHED, WORST, Journal
from tests.conftest import ROOT, command_environment

APP = """
import gc
import os
import weakref
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps import settings

class Network:
    def __init__(self):
        self.trainer = self  # as Lightning's model and trainer refer to each other

networks = weakref.WeakSet()

def job(config):
    with open("pids", "a") as file:
        print(os.getpid(), len(networks), file=file)
    network = Network()
    networks.add(network)
    if config.error.startswith("none"):
        return gc.get_freeze_count()
    if config.error == "exit":
        raise SystemExit(3)
    raise {
        "ordinary": ValueError("an ordinary one"),
        "diverged": UserError("the loss is nan", where="step 7", code=ExitCode.DIVERGED),
        "cuda": RuntimeError("CUDA error: an illegal memory access was encountered"),
        "memory": UserError("the GPU has no memory left", where="cuda:0", code=ExitCode.OUT_OF_MEMORY),
    }[config.error]

if __name__ == "__main__":
    settings.register()
    hydra.main(version_base="1.3", config_path=str(Path("conf").absolute()), config_name="app")(job)()
"""


def sweep(folder: Path, module: str, *words: str) -> subprocess.CompletedProcess:
    ray = ("hydra/launcher=ray_tune", "hydra.launcher.ray.init.num_cpus=1", "hydra.launcher.max_failures=1")
    return subprocess.run(
        [sys.executable, "-m", *module.split(), "-m", *ray, "hydra.sweep.dir=sweep", *words],
        cwd=folder,
        env=command_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text(f"error: none\nseed: 0\nhydra:\n  searchpath: ['file://{ROOT}/conf']\n")
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def test_errors_of_the_gpu_and_of_memory_end_their_process_and_an_ordinary_error_does_not(app):
    errors = {
        "ordinary": (FAILED, "ValueError: an ordinary one"),
        "none": (FINISHED, ""),
        "none_again": (FINISHED, ""),
        "exit": (FAILED, "SystemExit: 3"),
        "diverged": (DIVERGED, "the loss is nan"),
        "cuda": (FAILED, "RuntimeError: CUDA error: an illegal memory access was encountered"),
        "memory": (FAILED, "the GPU has no memory left"),
    }
    done = sweep(app, "app", f"error={','.join(errors)}")
    assert done.returncode != 0
    trials = Journal(app / "sweep").trials
    assert [(trials[number].state, trials[number].error) for number in range(7)] == [*errors.values()]
    assert "4 of 7 trials failed" in done.stderr
    assert "1 diverged" in done.stdout
    assert "diverged  #4 the loss is nan" in done.stdout
    assert json.loads((app / "sweep/.tune/returned/4.json").read_text())["value"] == -WORST, "it is not tried again"
    pids, others = zip(*(line.split() for line in (app / "pids").read_text().splitlines()), strict=True)
    assert set(others) == {"0"}, "the network of a trial before, failed or finished, is still in memory"
    assert len(pids) == 9, "what fails by itself is not repeated, what a broken process did once more (max_failures)"
    assert len(set(pids[:6])) == 1
    assert len(set(pids[5:])) == 4, "after a broken process one that no other had before"
    assert trials[1].value == 0, "after errors nothing is set aside: their frames hold the networks"
    assert trials[2].value > 100_000, "torch is not looked through after every trial"
    assert f"its process ended ({errors['cuda'][1]}); it goes on in a new one" in done.stdout


def test_a_process_that_cannot_begin_says_why(app):
    """Started so, the program's own module is not the one that has its function."""
    done = sweep(app, "cProfile -m app", "error=ordinary")
    assert Journal(app / "sweep").trials[0].error == "AttributeError: module 'cProfile' has no attribute 'job'", done
