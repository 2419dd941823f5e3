"""report.html: a run on one page, made from the files in the run's folder, and its images where they are at hand. It can be
made again at any time: python -m src.report run=runs/NAME"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from markupsafe import Markup

from src.engine.reports import plots
from src.engine.reports.answers import calibration, read_answers
from src.engine.reports.classes import confusion, count
from src.engine.reports.files import Row, read_columns, read_json, read_rows
from src.engine.reports.images import Gallery
from src.engine.reports.judgement import Evidence, judge
from src.engine.reports.labels_and_values import labels_of_file, values
from src.engine.reports.rendering import Cell, render
from src.engine.runs.files import write_text
from src.engine.runs.tables import column_titles, main_metric
from src.engine.runs.text import printable, shell_word
from src.engine.runs.ties import ties_text

if TYPE_CHECKING:
    from src.engine.runs.shown import Shown

Phases = Mapping[int, Sequence[str]]  # epoch, counted from 0 -> modules trained from then on, besides the earlier ones

CLASSES = ("multiclass", "binary")  # tasks whose label is one class
PHASES_OF_A_STEP = ("forward", "backward", "optimizer")  # as the columns of memory.csv name them


def write_report(
    folder: Path, phases: Phases | None = None, result: dict[str, Any] | None = None, shown: Shown | None = None
) -> Path:
    """Writes report.html into a run's folder and returns its path.

    folder: with config.yaml; the page leaves out what other files would show (an unfinished run, memory.log=false).
    phases: of the freezing schedule, marked in the learning curves. result: the content of result.json, if that is
    written later. shown: the images; a page without them says so.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    result, environment = result or read_json(folder / "result.json"), read_json(folder / "environment.json")
    metrics, rows = read_columns(folder / "metrics.csv"), read_rows(folder / "split.csv")
    task = config.get("task", {}).get("name", "multiclass")  # older runs have model.task, of one class per image too
    epochs, steps = metrics.get("epoch", []), metrics.get("step", [])
    changes = {epoch: names for epoch, names in (phases or {}).items() if 0 < epoch < max(epochs, default=0)}
    steps_of_changes = [step for epoch, step in zip(epochs, steps, strict=True) if epoch in changes]
    best = result["best_epoch"] if result.get("best_epoch") in epochs else None
    answers, counts = read_answers(folder / "predictions.csv"), count(rows, task)
    baseline = result.get("baseline") or {}
    doubts = read_rows(folder / "doubts.csv") if (folder / "doubts.csv").exists() else None
    page = render(
        Path(__file__).parent / "run.html.j2",
        title=folder.absolute().name,
        facts=_facts(config, result, environment, _images(rows, task in CLASSES)),
        judgement=judge(
            Evidence(
                config=config,
                result=result,
                epochs=metrics,
                images=Counter(row["split"] for row in rows),
                image_size=shown.preprocessing.image_size if shown else None,
                counts=counts.training if counts else {},
                doubts=None if doubts is None else len({row["path"] for row in doubts}),
                command=environment.get("command") or "",
            )
        ),
        result=result,
        metrics=_metrics(result),
        images=Gallery.of(shown, rows, doubts, answers),
        counts=counts,
        curves=_learning_curves(metrics, best, changes, baseline.get("as_epochs") or baseline.get("metrics", {})),
        curves_caption=_caption(best, changes, ties_text(result.get("val_ties"))),
        rates=_learning_rates(metrics),
        confusion=confusion(folder / "confusion.csv", result),
        calibration=calibration(answers) if answers else None,
        labels=labels_of_file(folder / "labels.csv", result),
        values=values(read_columns(folder / "values.csv")),
        memory=_memory(folder / "memory.csv", steps_of_changes),
        throughput=_throughput(metrics),
        command=environment.get("command"),
        settings=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        next_commands=_next_commands(folder) if result.get("state") == "finished" else [],
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _facts(
    config: dict[str, Any], result: dict[str, Any], environment: dict[str, Any], images: Sequence[str]
) -> list[str]:
    data = config["data"]
    words = (data["source"], data["name"] or data["root"] or data["table"])
    source = " ".join(printable(word) for word in words if word)
    facts = [f"{config['model']['backbone']} on {source}", *images]
    if "device" in result:
        facts.append(f"{result['device']}, {result.get('precision', config['precision']['name'])}")
    if "epochs" in result:
        facts.append(f"best epoch {result['best_epoch']} of {result['epochs']}, {result['steps']} steps")
        facts.append(f"{result['wall_seconds']:.1f} s")
    if "started" in environment:
        facts.append(environment["started"].replace("T", " ").replace("+00:00", " UTC"))
    return facts


def _images(rows: Sequence[Row], classes: bool) -> list[str]:
    """['1,797 images in 10 classes (1,259 train, 269 val, 269 test)'], or nothing without rows. classes: whether a label is
    one."""
    if not rows:
        return []
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


def _learning_curves(
    metrics: dict[str, list[float]], best: int | None, changes: Phases, baseline: Mapping[str, float]
) -> list[Markup]:
    """Loss and main metric of train and val, with a circle at the best epoch and a dotted line at each change. baseline: its
    metrics, a line to be above or below."""
    if not metrics:
        return []
    epochs, svgs = metrics["epoch"], []
    titles = column_titles(name for name in metrics if name.startswith("val/"))
    for name in ("loss", *main_metric(name for name in metrics if name.startswith("val/"))):
        columns = {split: metrics[f"{split}/{name}"] for split in ("train", "val") if f"{split}/{name}" in metrics}
        lines = {split: (epochs, values) for split, values in columns.items()}
        if f"val/{name}" in baseline:
            lines["baseline on val"] = (epochs, [baseline[f"val/{name}"]] * len(epochs))
        circle = None if best is None else (best, columns["val"][epochs.index(best)])
        starts = [epoch + 0.5 for epoch in changes]
        plot = plots.line_plot(lines, "epoch", titles[name], changes=starts, best=circle, logarithmic=name == "loss")
        svgs.append(plots.to_svg(plot, f"{titles[name]} of train and val over the epochs"))
    return svgs


def _caption(best: int | None, changes: Phases, ties: str | None = None) -> str:
    """ties: what val cannot tell."""
    caption = (
        "Train is measured while an epoch goes on, with augmentation, dropout and label smoothing where they are set; "
        "val at its end, without."
    )
    if best is not None:
        caption += f" Circle: the best epoch, {best}."
    if ties:
        caption += f" Val {ties}."
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


def _memory(file: Path, changes: Sequence[float]) -> list[Markup]:
    """changes: the steps after which more learns, and so more memory is needed."""
    columns = read_columns(file)
    lines = {}
    for name, column in columns.items():
        measured = ~np.isnan(column)  # of quick steps only some are
        if name.endswith("_mib") and measured.any():
            points = np.array([columns["step"], column])[:, measured]
            lines[name.removesuffix("_mib").replace("_", " ")] = plots.thinned(*points.tolist())
    by_phase = {name: line for name, line in lines.items() if any(phase in name for phase in PHASES_OF_A_STEP)}
    whole = {name: line for name, line in lines.items() if name not in by_phase}
    return [
        plots.to_svg(plots.line_plot(some, "step", "memory in MiB", changes=changes), label)
        for some, label in ((whole, "memory over the steps"), (by_phase, "memory in the phases of each step"))
        if some
    ]


def _throughput(metrics: dict[str, list[float]]) -> Markup | None:
    if "images_per_second" not in metrics:
        return None
    line = metrics["epoch"], metrics["images_per_second"]
    return plots.to_svg(plots.line_plot({"": line}, "epoch", "images per second"), "images per second over the epochs")


def _next_commands(folder: Path) -> list[str]:
    run, model = shell_word(folder.as_posix()), shell_word((folder / "model").as_posix())
    return [
        f"python -m src.predict run={run} images=FOLDER_OR_FILE",
        f"python -m src.predict model={model} images=FOLDER_OR_FILE",
        f"python -m src.evaluate run={run}",
    ]
