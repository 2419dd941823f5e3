"""A Hydra app without torch for tests of sweeps: its job sleeps, reports, and goes on from its position as a run does."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src.engine.runs.errors import Terminated, run_and_report
from src.engine.runs.files import write_json
from src.engine.sweeps import settings
from src.engine.sweeps.trial import FINISH, INTERRUPT, Trial, current
from tests.conftest import ROOT


def job(config: DictConfig) -> float:
    """Returns the best of what its epochs reached. Its weight grows by lr in every epoch, with a ripple of its own."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    position, trial = folder / "checkpoints" / "last.json", current() or Trial()
    state = json.loads(position.read_text()) if position.exists() else {"weight": 0.0, "values": []}
    values, lr = state["values"], config.optimizer.lr
    ended = trial.finish_after is not None and len(values) >= trial.finish_after
    while len(values) < config.trainer.max_epochs and not ended:
        time.sleep(config.pause)
        state["weight"] = grown(state["weight"], lr, len(values) + 1)
        values.append(state["weight"])
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["epoch", "objective"], *enumerate(values, start=1)])
        write_json(position, state)
        with (folder / "trained.txt").open("a") as file:
            file.write(f"{len(values)} {lr}\n")
        answer = trial.report({"objective": values[-1], "epoch": len(values)})
        if answer == INTERRUPT:
            raise Terminated
        ended = answer == FINISH
    return max(values)


def grown(weight: float, lr: float, epoch: int) -> float:
    """The weight after an epoch, counted from 1."""
    return weight + lr * (1 + 0.5 * math.sin(1000 * lr + epoch - 1))


def main() -> int:
    settings.register()
    sys.argv.append(f"hydra.searchpath=[file://{ROOT / 'conf'}]")
    conf = str(Path(__file__).parent / "conf")
    return run_and_report(hydra.main(version_base="1.3", config_path=conf, config_name="app")(job))


if __name__ == "__main__":
    raise SystemExit(main())
