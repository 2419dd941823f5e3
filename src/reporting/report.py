"""report.html: a run on one page, to be opened from disk, sent by mail or printed. Nothing in it comes from elsewhere.

Made by run.py at the end of a run, from the files in the run's folder alone, so it can be made again at any time:

    python -c "from pathlib import Path; from src.reporting.report import write_report; write_report(Path('runs/NAME'))"
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml

from src.files import NAMES, original, write_text
from src.reporting import plots
from src.reporting.tables import COLUMNS, PAIRS
from src.text import printable, printable_lines, shell_word

Phases = Mapping[int, Sequence[str]]  # epoch, counted from 0 -> modules trained from then on, besides the earlier ones

WORST = 10  # how many confusions are listed where the matrix is too large to be read
PHASES_OF_A_STEP = ("forward", "backward", "optimizer")  # as the columns of memory.csv name them

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title>
<style>
:root { color-scheme: light dark; --page: #ffffff; --ink: #222222; --faint: #666666; --rule: #dddddd; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #1b1b1b; --ink: #dddddd; --faint: #9a9a9a; --rule: #3c3c3c; }
}
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.5rem; }
p { margin: 0.5rem 0; }
table { border-collapse: collapse; }
th, td { padding: 0.2rem 1.2rem 0.2rem 0; border-bottom: 1px solid var(--rule); text-align: left; font-weight: normal; }
th { color: var(--faint); }
.text { min-width: 4rem; }
@media screen and (max-width: 30rem) { th, td { padding-right: 0.5rem; } }
.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
figure { margin: 0.5rem 0; break-inside: avoid; }
figure svg { background: #ffffff; }
figure svg text { font-family: system-ui, sans-serif !important; }
.shrinking { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.shrinking svg { max-width: 100%%; height: auto; }
.scrolling { overflow-x: auto; }
figcaption, .faint { color: var(--faint); font-size: 0.9rem; }
pre { font: 0.85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; margin: 0.5rem 0; }
figcaption { max-width: 45rem; }
@media print {
  .shrinking svg { max-width: 48%%; }
  .scrolling svg { max-width: 100%%; height: auto; }
}
%(style)s</style>
</head>
<body>
%(body)s
</body>
</html>
"""


def write_report(folder: Path, phases: Phases | None = None, result: dict[str, Any] | None = None) -> Path:
    """Writes report.html into a run's folder and returns its path.

    folder: with config.yaml; what else is missing (an unfinished run, memory.log=false) is left out of the page.
    phases: of the freezing schedule, to be marked in the learning curves. result: that of result.json, if it is to come.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    result, environment = result or _read_json(folder / "result.json"), _read_json(folder / "environment.json")
    metrics = _read_columns(folder / "metrics.csv")
    epochs, steps = metrics.get("epoch", []), metrics.get("step", [])
    changes = {epoch: names for epoch, names in (phases or {}).items() if 0 < epoch < max(epochs, default=0)}
    parts = [
        _headline(folder, config, result, environment),
        _metrics(result),
        _learning_curves(metrics, result, changes),
        _learning_rates(metrics),
        _confusion(folder / "confusion.csv", result),
        _memory(folder / "memory.csv", [step for epoch, step in zip(epochs, steps, strict=True) if epoch in changes]),
        _settings(config, environment),
        _next(folder, result),
    ]
    path = folder / "report.html"
    write_text(path, page(folder.absolute().name, parts))
    return path


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads somewhere: both as plain text, the target relative to the page."""

    text: str
    target: str


Cell = str | float | Link


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole HTML page. title: plain text; parts: HTML, '' for those that have nothing to show; style: further CSS.

    Control characters, and marks that turn or hide text, are shown with escapes wherever they stand.
    """
    body = "\n".join(part for part in parts if part)
    return printable_lines(PAGE % {"title": escape(printable(title)), "body": body, "style": style})


def section(title: str, *parts: str) -> str:
    """A heading and the HTML below it."""
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *parts, "</section>"])


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table; numbers stand to the right, fractions with four digits, as on the screen."""
    rows = list(rows)
    kinds = ["number" if isinstance(value, int | float) else "text" for value in rows[0]]

    def line(tag: str, values: Sequence[Cell]) -> str:
        cells = [f'<{tag} class="{kind}">{_inner(value)}</{tag}>' for kind, value in zip(kinds, values, strict=True)]
        return f"<tr>{''.join(cells)}</tr>"

    html = [line("th", header), *(line("td", row) for row in rows)]
    return "\n".join(["<table>", *html, "</table>"])


def _inner(value: Cell) -> str:
    if isinstance(value, Link):
        return f'<a href="{escape(quote(os.fsencode(value.target)))}">{escape(printable(value.text))}</a>'
    return escape(f"{value:.4f}" if isinstance(value, float) else printable(value))


def figure(svgs: Sequence[str], caption: str = "", kind: str = "shrinking") -> str:
    """Plots with a caption in plain text below them.

    kind: what happens on a phone. shrinking: they get smaller and stand below each other; scrolling: one that is full
    of small text keeps its size.
    """
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return "\n".join(["<figure>", f'<div class="{kind}">', *svgs, "</div>", note, "</figure>"])


def _headline(folder: Path, config: dict[str, Any], result: dict[str, Any], environment: dict[str, Any]) -> str:
    data = config["data"]
    source = " ".join(
        printable(value) for value in (data["source"], data["name"] or data["root"] or data["table"]) if value
    )
    facts = [f"{config['model']['backbone']} on {source}", *_images(folder / "split.csv")]
    if "device" in result:
        facts.append(f"{result['device']}, {config['precision']['name']}")
    if "epochs" in result:
        facts.append(f"best epoch {result['best_epoch']} of {result['epochs']}, {result['steps']} steps")
        facts.append(f"{result['wall_seconds']:.1f} s")
    if "started" in environment:
        facts.append(environment["started"].replace("T", " ").replace("+00:00", " UTC"))
    lines = [
        f"<h1>{escape(printable(folder.absolute().name))}</h1>",
        f'<p class="faint">{escape("; ".join(facts))}</p>',
    ]
    if result.get("state", "finished") != "finished":
        lines.append(f"<p>This run is not finished: {escape(result.get('error', result['state']))}</p>")
    return "\n".join(lines)


def _images(file: Path) -> list[str]:
    """['1,797 images in 10 classes (1,259 train, 269 val, 269 test)'], or nothing without the file."""
    if not file.exists():
        return []
    with file.open(newline="", **NAMES) as lines:
        rows = list(csv.DictReader(lines))
    sizes = Counter(row["split"] for row in rows)
    counts = ", ".join(f"{sizes[split]:,} {split}" for split in ("train", "val", "test") if sizes[split])
    return [f"{len(rows):,} images in {len({row['label'] for row in rows})} classes ({counts})"]


def _metrics(result: dict[str, Any]) -> str:
    metrics = result.get("metrics", {})
    if not metrics:
        return ""
    splits = dict.fromkeys(name.partition("/")[0] for name in metrics)
    # A run that is older than a metric lacks it.
    names = [name for name in COLUMNS if all(f"{split}/{name}" in metrics for split in splits)]
    values = {name: math.nan if value is None else value for name, value in metrics.items()}
    rows = [[split, *(values[f"{split}/{name}"] for name in names)] for split in splits]
    return section("Result", table(["", *(COLUMNS[name] for name in names)], rows))


def _learning_curves(metrics: dict[str, list[float]], result: dict[str, Any], changes: Phases) -> str:
    if not metrics:
        return ""
    epochs, best = metrics["epoch"], result.get("best_epoch")
    svgs = []
    for name in ("loss", "acc"):
        columns = {split: metrics[f"{split}/{name}"] for split in ("train", "val") if f"{split}/{name}" in metrics}
        lines = {split: (epochs, values) for split, values in columns.items()}
        circle = (best, columns["val"][epochs.index(best)]) if best in epochs else None
        plot = plots.line_plot(lines, "epoch", COLUMNS[name], changes=[epoch + 0.5 for epoch in changes], best=circle)
        svgs.append(plots.to_svg(plot, f"{COLUMNS[name]} of train and val over the epochs"))
    caption = (
        "Train is measured while an epoch goes on, with augmentation, dropout and label smoothing where they are set; "
        "val at its end, without."
    )
    if best in epochs:
        caption += f" Circle: the best epoch, {best}."
    if changes:
        caption += f" Dotted lines, where more learns: {_described(changes)}."
    return section("Learning curves", figure(svgs, caption))


def _described(changes: Phases) -> str:
    """'layer4 from epoch 3 on; ...', with epochs as the plots count them, from 1."""
    texts = []
    for epoch, names in changes.items():
        short = [name.removeprefix("backbone.") for name in names]
        which = ", ".join(short) if len(short) <= 3 else f"{short[0]} to {short[-1]} ({len(short)} blocks)"
        texts.append(f"{which} from epoch {epoch + 1} on")
    return "; ".join(texts)


def _learning_rates(metrics: dict[str, list[float]]) -> str:
    lines = {
        name.removeprefix("lr/"): (metrics["epoch"], rates) for name, rates in metrics.items() if name.startswith("lr/")
    }
    if not lines:
        return ""
    svg = plots.to_svg(plots.line_plot(lines, "epoch", "learning rate"), "learning rates over the epochs")
    return section("Learning rates", figure([svg], "At the end of each epoch."))


def _confusion(file: Path, result: dict[str, Any]) -> str:
    if not file.exists():
        return ""
    with file.open(newline="", **NAMES) as lines:
        (first, *classes), *rows = ([original(cell) for cell in row] for row in csv.reader(lines))
    drawn = first != PAIRS[0]  # of many classes only the pairs that occurred are in the file
    if drawn:
        matrix = np.array([row[1:] for row in rows], dtype=np.int64)
        pairs = [(classes[true], classes[taken], int(matrix[true, taken])) for true, taken in np.argwhere(matrix)]
    else:
        pairs = [(true, taken, int(count)) for true, taken, count in rows]
    of_class: Counter[str] = Counter()
    for true, _, count in pairs:
        of_class[true] += count
    mistakes = sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: -pair[2])
    wrong, split = sum(pair[2] for pair in mistakes), "test" if "test/acc" in result.get("metrics", {}) else "val"
    parts = [f"<p>{wrong:,} of {of_class.total():,} {split} images were taken for another class.</p>"]
    if drawn:
        svg = plots.to_svg(plots.heat_map(matrix, classes, "predicted class", "true class"), "confusion matrix")
        parts.append(figure([svg], "The darker, the larger the share of the true class's images.", kind="scrolling"))
    if wrong and not (drawn and len(classes) <= plots.NUMBERED_CLASSES):
        worst = [(*pair, of_class[pair[0]]) for pair in mistakes[:WORST]]
        parts.append(table(("true class", "predicted", "images", "of"), worst))
    return section("Confusion matrix", *parts)


def _memory(file: Path, changes: Sequence[float]) -> str:
    """changes: the steps after which more learns, and so more memory is needed."""
    memory = _read_columns(file)
    lines = {
        name.removesuffix("_mib").replace("_", " "): plots.thinned(memory["step"], values)
        for name, values in memory.items()
        if name.endswith("_mib") and not np.isnan(values).all()
    }
    by_phase = {name: line for name, line in lines.items() if any(phase in name for phase in PHASES_OF_A_STEP)}
    whole = {name: line for name, line in lines.items() if name not in by_phase}
    svgs = [
        plots.to_svg(plots.line_plot(some, "step", "memory in MiB", changes=changes), label)
        for some, label in ((whole, "memory over the steps"), (by_phase, "memory in the phases of each step"))
        if some
    ]
    return section("Memory", figure(svgs)) if svgs else ""


def _settings(config: dict[str, Any], environment: dict[str, Any]) -> str:
    command = f"<pre>{escape(environment['command'])}</pre>" if "command" in environment else ""
    everything = escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return section("Settings", command, f"<details><summary>all settings</summary><pre>{everything}</pre></details>")


def _next(folder: Path, result: dict[str, Any]) -> str:
    if result.get("state") != "finished":
        return ""
    run, model = shell_word(folder.as_posix()), shell_word((folder / "model").as_posix())
    commands = [
        f"python -m src.predict run={run} images=FOLDER_OR_FILE",
        f"python -m src.predict model={model} images=FOLDER_OR_FILE",
        f"python -m src.evaluate run={run}",
    ]
    return section("Use the model", f"<pre>{escape(chr(10).join(commands))}</pre>")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_columns(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers, an empty cell as nan; {} without the file."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return {name: [float(row[place] or "nan") for row in rows] for place, name in enumerate(header)}
