"""What stopping bad trials early saves on the default job: scheduler=asha against none, at the same points.

    python scripts/benchmarks/asha.py [--trials 27] [--epochs 12] [--folder runs/asha] [KEY=VALUE ...]

Run it in the project's folder; KEY=VALUE are settings of src.train for both sweeps. The sweeps run one after the other in
FOLDER/none and FOLDER/asha, two trials at a time with one core each. FOLDER/times.json keeps the seconds, so that an
interrupted benchmark continues when the command is repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from src.engine.runs.files import write_json

SCHEDULERS = ("none", "asha")
SPACE = (
    "optimizer.lr=tag(log,interval(1e-4,1e-1))",
    "optimizer.backbone_lr_scale=choice(0.1,0.3,1)",
    "freeze.last_n=choice(6,12,24)",
)
SETTINGS = ("hydra.sweeper.ray.init.num_cpus=2", "hydra.sweeper.resources.cpu=1")


@dataclass(frozen=True)
class Outcome:
    """Result of a sweep. points: the swept values of each trial, as in sweep.csv."""

    best_val: float
    test: float  # accuracy of the winner on the test split
    epochs: int  # of all trials together
    points: list[dict[str, str]]


def run_sweep(folder: Path, trials: int, *words: str) -> float:
    """Seconds of `python -m src.train -m` with random points. Raises SystemExit if the sweep fails."""
    command = [sys.executable, "-m", "src.train", "-m", "hydra/sweeper=ray_tune", "hydra.sweeper.search=random"]
    names = [f"runs_dir={folder.parent}", f"name={folder.name}", f"hydra.sweeper.num_samples={trials}"]
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *names, *words], env=environment, stdout=sys.stderr
    ) as sweep:  # progress is no result
        try:
            code = sweep.wait()
        except KeyboardInterrupt:  # sent to the sweep too, which saves its trials' positions
            code = sweep.wait()
    if code:
        sys.exit(code)
    return time.perf_counter() - start


def read_outcome(folder: Path) -> Outcome:
    """Outcome of a finished sweep. best_folder is relative to the project's folder."""
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text(encoding="utf-8"))
    winner = json.loads((Path(best["best_folder"]) / "result.json").read_text(encoding="utf-8"))
    with (folder / "sweep.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return Outcome(
        best_val=best["best_value"],
        test=winner["metrics"]["test/acc"],
        epochs=sum(int(row["epochs"]) for row in rows),
        points=[{key: row[key] for key in best["best_params"]} for row in rows],
    )


def measure(folder: Path, scheduler: str, trials: int, words: list[str]) -> float:
    """Seconds of a sweep, including interrupted attempts."""
    file = folder / "times.json"
    times = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    entry = times.setdefault(scheduler, {"done": False, "seconds": 0.0, "trials": trials, "words": words})
    if (entry["trials"], entry["words"]) != (trials, words):
        sys.exit(f"{file} belongs to other settings: {entry}; choose another --folder")
    if not entry["done"]:
        print(f"scheduler={scheduler}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        try:
            run_sweep(folder / scheduler, trials, f"hydra.sweeper.scheduler={scheduler}", *SETTINGS, *SPACE, *words)
            entry["done"] = True
        finally:
            entry["seconds"] += time.perf_counter() - start
            write_json(file, times)
    return entry["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("runs/asha"))
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()

    words = [f"trainer.max_epochs={options.epochs}", *options.words]
    seconds = {name: measure(options.folder, name, options.trials, words) for name in SCHEDULERS}
    outcomes = {name: read_outcome(options.folder / name) for name in SCHEDULERS}
    none, asha = (outcomes[name] for name in SCHEDULERS)
    assert none.points == asha.points, "the two sweeps tried different points"

    print(f"\n{len(none.points)} trials of {options.epochs} epochs, the same points")
    print(f"{'scheduler':10} {'seconds':>8} {'epochs':>7} {'best val/acc':>13} {'its test/acc':>13}")
    for name, outcome in outcomes.items():
        print(f"{name:10} {seconds[name]:8.0f} {outcome.epochs:7} {outcome.best_val:13.4f} {outcome.test:13.4f}")
    print(
        f"asha over none: {seconds['asha'] / seconds['none']:.2f} of the time, {asha.epochs / none.epochs:.2f} of the "
        f"epochs, best val/acc {100 * (asha.best_val - none.best_val):+.2f} points"
    )


if __name__ == "__main__":
    main()
