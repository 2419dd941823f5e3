"""data.folds=5: as many runs, each with another part of the images as its test split, and what they have in common.

    runs/cv/fold_0/ ... fold_4/   ordinary runs, which a repeated command continues; data.fold=2 name=cv/fold_2 trains one alone
    runs/cv/predictions.csv       of every image, by the run that has not learned from it
    runs/cv/result.json           the mean of each metric over the folds, and its standard deviation
    runs/cv/report.html           what all of them reach, by the room reports

Called by src/train.py. Nothing here imports torch, since a run may have processes of its own.
"""

from __future__ import annotations

import csv
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.engine import features
from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected, shell_command
from src.engine.processes.launching import launched_from_outside
from src.engine.runs.errors import UserError
from src.engine.runs.files import write_csv, write_json
from src.engine.runs.run_dir import read_result
from src.engine.runs.run_lookup import fold_runs
from src.engine.runs.run_names import claim, new_name
from src.engine.runs.tables import metrics_table
from src.engine.runs.text import printable

log = logging.getLogger(__name__)


def trains_all_folds(config: Config) -> bool:
    return config.data.folds is not None and config.data.fold is None


def train_folds(config: Config, train: Callable[[Config, Path], float]) -> float:
    """Trains the folds that are not finished, one after the other. Returns the mean of checkpoint.monitor over all.

    train: one run, in the folder. The error of a fold ends the command: repeated, it goes on with that fold.
    """
    if launched_from_outside():
        raise UserError(
            f"data.folds={config.data.folds} without data.fold cannot be started by torchrun",
            where="data.folds",
            why="it is several runs, and the processes of a launch meet for a single one",
            fix=corrected("data.fold=0", f"name={config.name or 'cv'}/fold_0") + "   # and likewise the others",
        )
    runs_dir, name, number = Path(config.runs_dir), config.name or new_name(), config.data.folds
    log.info(f"folds     {number} runs, in {printable(runs_dir / name)}")
    for fold in range(number):
        log.info(f"\nfold_{fold}   {fold + 1} of {number} folds")
        run = f"{name}/fold_{fold}"
        train(replace(config, name=run, data=replace(config.data, fold=fold)), claim(runs_dir, run))
    path = runs_dir / name
    mean = _finish(config, path, fold_runs(path)[:number])
    return mean.get(config.checkpoint.monitor, math.nan)


def _finish(config: Config, path: Path, runs: Sequence[Path]) -> dict[str, float]:
    """Writes the files of all folds, and shows them. Returns the means."""
    results = {run.name: read_result(run) for run in runs}
    mean, std = _mean_and_std([result["metrics"] for result in results.values()])
    _join_predictions(path / "predictions.csv", runs)
    result = {
        "state": "finished", "folds": len(runs), "metrics": mean, "std": std, "runs": [*results], "name": path.name,
        "command": shell_command(), "wall_seconds": round(sum(result["wall_seconds"] for result in results.values()), 2),
    }  # fmt: skip
    write_json(path / "result.json", result)
    rows = {name: result["metrics"] for name, result in results.items()} | {"mean": mean, "std": std}
    table = {
        f"{row}/{name.removeprefix('test/')}": value
        for row, values in rows.items()
        for name, value in values.items()
        if name.startswith("test/")
    }
    log.info(f"\nthe test splits of the {len(runs)} folds, with their mean and standard deviation\n")
    log.info(metrics_table(table))
    for feature in features.FEATURES:
        feature.folds_report(path, config)
    log.info(f"files     {printable(path)}/: result.json, predictions.csv, {runs[0].name}/ to {runs[-1].name}/")
    return mean


def _mean_and_std(metrics: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Of the metrics that all runs have."""
    values = {name: [each[name] for each in metrics if each.get(name) is not None] for name in metrics[0]}
    values = {name: numbers for name, numbers in values.items() if len(numbers) == len(metrics)}
    mean = {name: statistics.mean(numbers) for name, numbers in values.items()}
    return mean, {name: statistics.stdev(numbers) for name, numbers in values.items()}


def _join_predictions(out: Path, runs: Sequence[Path]) -> None:
    """One file of what each fold's run says about its test split."""
    header, rows = [], []
    for fold, run in enumerate(runs):
        with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
            header, *own = csv.reader(file)
        rows += [[path, str(fold), *answers] for path, *answers in own]
    path, *rest = header
    write_csv(out, [path, "fold", *rest], rows)
