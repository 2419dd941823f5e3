"""report.html: a run on one page, made from the files in the run's folder alone, so it can be made again at any time:

python -c "from pathlib import Path; from src.engine.reports.report import write_report; write_report(Path('runs/NAME'))"
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from src.engine.reports import plots
from src.engine.reports.rendering import Cell, render
from src.engine.runs.files import NAMES, original, write_text
from src.engine.runs.tables import PAIRS, column_titles, main_metric
from src.engine.runs.text import printable, shell_word

Phases = Mapping[int, Sequence[str]]  # epoch, counted from 0 -> modules trained from then on, besides the earlier ones

CLASSES = ("multiclass", "binary")  # tasks whose label is one class
MOST_PLOTS, MOST_POINTS = 6, 2000  # of predicted values
LONGEST_LIST = 10  # confusions that are listed where the matrix is too large to be read
PHASES_OF_A_STEP = ("forward", "backward", "optimizer")  # as the columns of memory.csv name them


def write_report(folder: Path, phases: Phases | None = None, result: dict[str, Any] | None = None) -> Path:
    """Writes report.html into a run's folder and returns its path.

    folder: with config.yaml; the page leaves out what other files would show (an unfinished run, memory.log=false).
    phases: of the freezing schedule, marked in the learning curves. result: the content of result.json, if that is
    written later.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    result, environment = result or _read_json(folder / "result.json"), _read_json(folder / "environment.json")
    metrics = _read_columns(folder / "metrics.csv")
    epochs, steps = metrics.get("epoch", []), metrics.get("step", [])
    changes = {epoch: names for epoch, names in (phases or {}).items() if 0 < epoch < max(epochs, default=0)}
    steps_of_changes = [step for epoch, step in zip(epochs, steps, strict=True) if epoch in changes]
    best = result["best_epoch"] if result.get("best_epoch") in epochs else None
    page = render(
        Path(__file__).parent / "run.html.j2",
        title=folder.absolute().name,
        facts=_facts(folder, config, result, environment),
        result=result,
        metrics=_metrics(result),
        curves=_learning_curves(metrics, best, changes),
        curves_caption=_caption(best, changes),
        rates=_learning_rates(metrics),
        confusion=_confusion(folder / "confusion.csv", result),
        labels=_labels(folder / "labels.csv", result),
        values=_values(folder / "values.csv"),
        memory=_memory(folder / "memory.csv", steps_of_changes),
        command=environment.get("command"),
        settings=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        next_commands=_next_commands(folder) if result.get("state") == "finished" else [],
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _facts(folder: Path, config: dict[str, Any], result: dict[str, Any], environment: dict[str, Any]) -> list[str]:
    data = config["data"]
    words = (data["source"], data["name"] or data["root"] or data["table"])
    source = " ".join(printable(word) for word in words if word)
    task = config.get("task", {}).get("name", "multiclass")  # older runs have model.task, of one class per image too
    facts = [f"{config['model']['backbone']} on {source}", *_images(folder / "split.csv", task in CLASSES)]
    if "device" in result:
        facts.append(f"{result['device']}, {config['precision']['name']}")
    if "epochs" in result:
        facts.append(f"best epoch {result['best_epoch']} of {result['epochs']}, {result['steps']} steps")
        facts.append(f"{result['wall_seconds']:.1f} s")
    if "started" in environment:
        facts.append(environment["started"].replace("T", " ").replace("+00:00", " UTC"))
    return facts


def _images(file: Path, classes: bool) -> list[str]:
    """['1,797 images in 10 classes (1,259 train, 269 val, 269 test)'], or nothing without the file. classes: whether a label
    is one."""
    if not file.exists():
        return []
    with file.open(newline="", **NAMES) as lines:
        rows = list(csv.DictReader(lines))
    sizes = Counter(row["split"] for row in rows)
    counts = ", ".join(f"{sizes[split]:,} {split}" for split in ("train", "val", "test") if sizes[split])
    in_classes = f" in {len({row['label'] for row in rows})} classes" if classes else ""
    return [f"{len(rows):,} images{in_classes} ({counts})"]


def _metrics(result: dict[str, Any]) -> tuple[list[str], list[list[Cell]]] | None:
    """Header and rows of the table of results: a row per split."""
    values = {name: math.nan if value is None else value for name, value in result.get("metrics", {}).items()}
    if not values:
        return None
    splits = dict.fromkeys(name.partition("/")[0] for name in values)
    # A run that is older than a metric lacks it.
    titles = column_titles(values)
    names = [name for name in titles if all(f"{split}/{name}" in values for split in splits)]
    rows: list[list[Cell]] = [[split, *(values[f"{split}/{name}"] for name in names)] for split in splits]
    return ["", *(titles[name] for name in names)], rows


def _learning_curves(metrics: dict[str, list[float]], best: int | None, changes: Phases) -> list[Markup]:
    """Loss and main metric of train and val, with a circle at the best epoch and a dotted line at each change."""
    if not metrics:
        return []
    epochs, svgs = metrics["epoch"], []
    titles = column_titles(name for name in metrics if name.startswith("val/"))
    for name in ("loss", *main_metric(name for name in metrics if name.startswith("val/"))):
        columns = {split: metrics[f"{split}/{name}"] for split in ("train", "val") if f"{split}/{name}" in metrics}
        lines = {split: (epochs, values) for split, values in columns.items()}
        circle = None if best is None else (best, columns["val"][epochs.index(best)])
        plot = plots.line_plot(lines, "epoch", titles[name], changes=[epoch + 0.5 for epoch in changes], best=circle)
        svgs.append(plots.to_svg(plot, f"{titles[name]} of train and val over the epochs"))
    return svgs


def _caption(best: int | None, changes: Phases) -> str:
    caption = (
        "Train is measured while an epoch goes on, with augmentation, dropout and label smoothing where they are set; "
        "val at its end, without."
    )
    if best is not None:
        caption += f" Circle: the best epoch, {best}."
    texts = []
    for epoch, names in changes.items():
        short = [name.removeprefix("backbone.") for name in names]
        which = ", ".join(short) if len(short) <= 3 else f"{short[0]} to {short[-1]} ({len(short)} blocks)"
        texts.append(f"{which} from epoch {epoch + 1} on")  # the plots count epochs from 1
    return f"{caption} Dotted lines, where more learns: {'; '.join(texts)}." if texts else caption


def _learning_rates(metrics: dict[str, list[float]]) -> Markup | None:
    rates = {name.removeprefix("lr/"): values for name, values in metrics.items() if name.startswith("lr/")}
    lines = {name: (metrics["epoch"], values) for name, values in rates.items()}
    plot = plots.line_plot(lines, "epoch", "learning rate") if lines else None
    return plots.to_svg(plot, "learning rates over the epochs") if plot else None


@dataclass(frozen=True)
class _Confusion:
    """svg: the matrix, unless confusion.csv holds only pairs. worst: true class, predicted class, images, of."""

    summary: str
    svg: Markup | None
    worst: list[tuple[Cell, ...]]


def _confusion(file: Path, result: dict[str, Any]) -> _Confusion | None:
    if not file.exists():
        return None
    with file.open(newline="", **NAMES) as lines:
        (first, *classes), *rows = ([original(cell) for cell in row] for row in csv.reader(lines))
    svg = None
    if first == PAIRS[0]:  # of many classes the file holds only the pairs that occurred
        pairs = [(true, predicted, int(count)) for true, predicted, count in rows]
    else:
        matrix = np.array([row[1:] for row in rows], dtype=np.int64)
        pairs = [(classes[true], classes[column], int(matrix[true, column])) for true, column in np.argwhere(matrix)]
        svg = plots.to_svg(plots.heat_map(matrix, classes, "predicted class", "true class"), "confusion matrix")
    of_class: Counter[str] = Counter()
    for true, _, count in pairs:
        of_class[true] += count
    mistakes = sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: -pair[2])
    wrong, split = sum(pair[2] for pair in mistakes), "test" if "test/acc" in result.get("metrics", {}) else "val"
    is_readable = svg is not None and len(classes) <= plots.NUMBERED_CLASSES
    return _Confusion(
        f"{wrong:,} of {of_class.total():,} {split} images were taken for another class.",
        svg,
        [] if is_readable else [(*pair, of_class[pair[0]]) for pair in mistakes[:LONGEST_LIST]],
    )


@dataclass(frozen=True)
class _Labels:
    """rows: the numbers of each label; of many the LONGEST_LIST with the lowest F1. svg: of all, unless they are many."""

    rows: list[list[Cell]]
    svg: Markup | None
    caption: str


def _labels(file: Path, result: dict[str, Any]) -> _Labels | None:
    if not file.exists():
        return None
    with file.open(newline="", **NAMES) as lines:
        rows = [(original(name), [*map(_number, cells)]) for name, *cells in [*csv.reader(lines)][1:]]
    few = len(rows) <= plots.NUMBERED_CLASSES
    marks = {
        title: [numbers[column] for _, numbers in rows]
        for title, column in (("F1", 4), ("precision", 2), ("recall", 3))
    }
    svg = plots.to_svg(plots.dot_plot(marks, [name for name, _ in rows]), "F1 of the labels") if few else None
    worst = sorted(rows, key=lambda row: 2 if math.isnan(row[1][4]) else row[1][4])[:LONGEST_LIST]
    split = "test" if any(name.startswith("test/") for name in result.get("metrics", {})) else "val"
    which = "" if few else f" The {LONGEST_LIST} of {len(rows):,} with the lowest F1; labels.csv has all."
    shown: list[list[Cell]] = [
        [name, int(images), int(predicted), *rest] for name, (images, predicted, *rest) in (rows if few else worst)
    ]
    return _Labels(shown, svg, f"Of the {split} images.{which}")


@dataclass(frozen=True)
class _Values:
    """header, rows: a table with a row per name. svgs: predicted over true values, of the first names."""

    header: list[str]
    rows: list[list[Cell]]
    svgs: list[Markup]
    caption: str


def _values(file: Path) -> _Values | None:
    if not (columns := _read_columns(file)):
        return None
    rows: list[list[Cell]] = []
    svgs = []
    for name in [column.removeprefix("true_") for column in columns if column.startswith("true_")]:
        true, predicted = np.array(columns[f"true_{name}"]), np.array(columns[f"predicted_{name}"])
        error = predicted - true
        rmse, spread = float(np.sqrt((error**2).mean())), float(true.std())
        r2 = 1 - (rmse / spread) ** 2 if spread > 0 else math.nan
        rows.append([name, r2, float(abs(error).mean()), rmse, spread])
        if len(svgs) < MOST_PLOTS:
            some = np.linspace(0, len(true) - 1, min(len(true), MOST_POINTS)).astype(int)
            plot = plots.scatter_plot(true[some], predicted[some], name)
            svgs.append(plots.to_svg(plot, f"predicted and true values {len(svgs) + 1}: {name}"))
    number = len(next(iter(columns.values())))
    shown = f"{MOST_POINTS:,} of {number:,}" if number > MOST_POINTS else f"{number:,}"
    header = ["", "R2", "MAE", "RMSE", "RMSE of the mean"]
    return _Values(header, rows, svgs, f"{shown} images. On the dotted line a prediction is right.")


def _memory(file: Path, changes: Sequence[float]) -> list[Markup]:
    """changes: the steps after which more learns, and so more memory is needed."""
    columns = _read_columns(file)
    lines = {
        name.removesuffix("_mib").replace("_", " "): plots.thinned(columns["step"], values)
        for name, values in columns.items()
        if name.endswith("_mib") and not np.isnan(values).all()
    }
    by_phase = {name: line for name, line in lines.items() if any(phase in name for phase in PHASES_OF_A_STEP)}
    whole = {name: line for name, line in lines.items() if name not in by_phase}
    return [
        plots.to_svg(plots.line_plot(some, "step", "memory in MiB", changes=changes), label)
        for some, label in ((whole, "memory over the steps"), (by_phase, "memory in the phases of each step"))
        if some
    ]


def _next_commands(folder: Path) -> list[str]:
    run, model = shell_word(folder.as_posix()), shell_word((folder / "model").as_posix())
    return [
        f"python -m src.predict run={run} images=FOLDER_OR_FILE",
        f"python -m src.predict model={model} images=FOLDER_OR_FILE",
        f"python -m src.evaluate run={run}",
    ]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_columns(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers, an empty cell as nan; {} without the file."""
    if not path.exists():
        return {}
    with path.open(newline="", **NAMES) as file:
        header, *rows = csv.reader(file)
    return {name: [_number(row[place]) for row in rows] for place, name in enumerate(header)}


def _number(cell: str) -> float:
    return float(cell or "nan")
