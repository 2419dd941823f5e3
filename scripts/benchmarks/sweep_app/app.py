"""A small Hydra app for sweeps.py: its jobs are so short that the launcher takes most of the time.

    python -m scripts.benchmarks.sweep_app.app work=training                        from the project's folder
    python -m scripts.benchmarks.sweep_app.app -m hydra/launcher=ray_tune lr=0.01,0.1

It is also an example of a Hydra app other than src/train.py under hydra/launcher=ray_tune and hydra/sweeper=ray_tune.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

import src.features  # noqa: F401 (makes the rooms known: the sweeps, and their report)
from src.engine import features


def job(config: DictConfig) -> float:
    """Returns the sweep's objective: more is better."""
    if config.work == "trivial":
        return float(config.lr)

    from scripts.benchmarks.sweep_app.training import train  # imports torch, which takes seconds

    return train(config.lr, config.trainer.max_epochs)


if __name__ == "__main__":
    features.register()
    hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="app")(job)()
