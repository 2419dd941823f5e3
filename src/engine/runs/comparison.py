"""Finished runs side by side: the work of src/compare.py. Everything is read from the runs' folders."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.engine.commands.schema import METRICS
from src.engine.runs.files import NAMES, cannot_write, make_folder, original, read_metrics, write_atomically
from src.engine.runs.paired import LEVEL, compared_images
from src.engine.runs.run_dir import read_result
from src.engine.runs.run_settings import flat
from src.engine.runs.tables import column_titles, interval_text, main_metric
from src.engine.runs.text import as_typed, decimal, plural, printable, shell_word

log = logging.getLogger(__name__)

Image = tuple[str, str]  # path, label
Answers = dict[Image, Any]  # whether an image was right, or the size of its error


@dataclass(frozen=True)
class Run:
    folder: Path
    config: dict[str, Any]  # data.batch_size: 32, ...
    result: dict[str, Any]  # result.json

    @classmethod
    def read(cls, folder: Path) -> Run:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return cls(folder, flat(config), read_result(folder))

    @property
    def name(self) -> str:
        return printable(self.folder.absolute().name)

    def metric(self, split: str, name: str) -> float | None:
        return self.result["metrics"].get(f"{split}/{name}")

    def predictions(self, split: str) -> Path | None:
        """The file with a row per image, of the run itself or of src.evaluate."""
        files = [self.folder / "predictions.csv", self.folder / f"evaluation_{split}_predictions.csv"]
        return next((file for file in files if file.is_file()), None)


def compare(folders: Sequence[Path], out: Path) -> None:
    """Prints the comparison and draws the curves. Raises UserError where `out` cannot be written."""
    runs = [Run.read(folder) for folder in folders]
    metrics = [run.result["metrics"] for run in runs]
    split = "test" if all(any(name.startswith("test/") for name in own) for own in metrics) else "val"
    _print(_metrics(runs, split))
    _print(_settings(runs))
    for line in _differences(runs, split):
        log.info(line)
    _draw(runs, out)


def _metrics(runs: Sequence[Run], split: str) -> list[list[str]]:
    names = {name for run in runs for name in run.result["metrics"] if name.startswith(f"{split}/")}
    titles = column_titles(names)
    rows = [[split, *titles.values()]]
    for run in runs:
        cells = []
        for name in titles:
            value = run.metric(split, name)
            sure = (run.result.get("intervals") or {}).get(f"{split}/{name}")
            cells.append(("" if value is None else decimal(value)) + (f" ({interval_text(*sure)})" if sure else ""))
        rows.append([run.name, *cells])
    return rows


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    """The keys that differ, with a row each."""
    rows = [["setting", *(run.name for run in runs)]]
    for key in dict.fromkeys(key for run in runs for key in run.config if key != "name"):
        values = [as_typed(run.config[key]) if key in run.config else "" for run in runs]
        if len({*values}) > 1:
            rows.append([key, *map(printable, values)])
    return rows if len(rows) > 1 else [["no setting differs"]]


def _print(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        log.info("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    log.info("")


def _differences(runs: Sequence[Run], split: str) -> list[str]:
    """A line for the run with the best main metric beside each of the others."""
    (name,) = main_metric(runs[0].result["metrics"]) or ["loss"]
    sign = 1 if METRICS.get(f"val/{name}", "max") == "max" else -1
    best = max(runs, key=lambda run: -math.inf if (value := run.metric(split, name)) is None else sign * value)
    others = [run for run in runs if run is not best]
    lines, answers = [], {run.folder: _answers(run, split) for run in runs}
    for run in [run for run in runs if not answers[run.folder]]:
        command = f"python -m src.evaluate run={shell_word(run.folder)}"
        lines.append(f"{run.name} has no predictions of its {split} images that can be compared: {command}")
    level = LEVEL / len(others)  # Bonferroni: of 20 equal runs, one would look better by chance
    for run in others:
        ours, theirs = answers[best.folder], answers[run.folder]
        if not ours or not theirs:
            continue
        if ours.keys() != theirs.keys():
            common = len(ours.keys() & theirs.keys())
            lines.append(
                f"{best.name} and {run.name} are not comparable image by image: they have other {split} images, {common} in "
                "common. data.split_file= trains on the split of another run."
            )
            continue
        groups = _groups(best, split, ours)
        text, is_sure = _compared(
            [ours[key] for key in ours], [theirs[key] for key in ours], (best.name, run.name), level, groups
        )
        lines.append(f"{best.name} against {run.name}: {text}: {'larger than chance' if is_sure else 'may be chance'}")
    if len(others) > 1:
        lines.append(f"{len(others)} pairs are compared, so p must be below {level:.2g} instead of {LEVEL}.")
        lines.append(f"{best.name} is the best of {len(runs)} on these images, so its own number is a little too good.")
    return lines


def _compared(
    ours: list[Any], theirs: list[Any], names: tuple[str, str], level: float, groups: list[str] | None
) -> tuple[str, bool]:
    """What is known of the difference, and whether it is larger than chance. groups: of the images; None: each for itself."""
    (name, other), is_share = names, isinstance(ours[0], bool)
    gains = np.array(ours, float) - np.array(theirs, float) if is_share else np.array(theirs) - np.array(ours)
    p, test = compared_images(gains, groups)
    if is_share:
        what = f"{plural(int((gains > 0).sum()), 'image')} right by {name} alone, {(gains < 0).sum()} by {other} alone"
    else:
        what = f"mean error smaller by {decimal(gains.mean())}"
    return f"{what}, p = {p:.2g} ({test})", p < level and gains.mean() > 0


def _groups(run: Run, split: str, images: Answers) -> list[str] | None:
    """The group of each image; None where the file does not know it."""
    group_of = {(row["path"], _label(row)): row.get("group") for row in _rows(run, split)}
    groups = [group_of.get(image) for image in images]
    return [str(group) for group in groups] if all(groups) else None


def _answers(run: Run, split: str) -> Answers | None:
    """None without the file, or with one of another task."""
    if not (rows := _rows(run, split)):
        return None
    errors = [key for key in rows[0] if key.startswith("error_")]
    if "predicted" in rows[0]:
        return {(row["path"], _label(row)): row["true"] == row["predicted"] for row in rows}
    if "labels" in rows[0]:
        return {(row["path"], _label(row)): _labels(row["true"]) == _labels(row["labels"]) for row in rows}
    if errors:
        return {(row["path"], _label(row)): float(np.mean([abs(float(row[key])) for key in errors])) for row in rows}
    return None


def _rows(run: Run, split: str) -> list[dict[str, str]]:
    if (file := run.predictions(split)) is None:
        return []
    with file.open(newline="", **NAMES) as lines:
        return [{key: original(cell) for key, cell in row.items()} for row in csv.DictReader(lines)]


def _label(row: dict[str, str]) -> str:
    """The label of an image; of task=regression its values."""
    return row["true"] if "true" in row else ";".join(row[key] for key in row if key.startswith("true_"))


def _labels(text: str) -> set[str]:
    return {name.strip() for name in text.split(";")} - {""}


def _draw(runs: Sequence[Run], out: Path) -> None:
    """The metric that chose the best epoch of the first run, over the epochs of all."""
    monitor = runs[0].config["checkpoint.monitor"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        file = run.folder / "metrics.csv"
        rows = [row for row in (read_metrics(file) if file.exists() else []) if monitor in row]
        if rows:
            axes.plot([row["epoch"] for row in rows], [row[monitor] for row in rows], marker=".", label=run.name)
        else:
            log.info(f"{run.name} has no epochs with {monitor}, so it has no curve.")
    if not axes.lines:
        return
    axes.set(xlabel="epoch", ylabel=monitor)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#DDDDDD")
    axes.legend()
    make_folder(out.absolute().parent, "out", out.name)
    try:
        write_atomically(out, lambda file: figure.savefig(file, format="png", dpi=150))
    except OSError as error:
        raise cannot_write(out, error, "df -h .") from error
    log.info(f"curves    {printable(out)}")
