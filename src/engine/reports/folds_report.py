"""report.html of data.folds: a run's page, of what each fold's run says about the images that it has not learned from."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from scipy.stats import t as student

from src.engine.reports.answers import calibration, read_answers
from src.engine.reports.classes import confusion_of, count
from src.engine.reports.files import Row, read_columns, read_json, read_rows, read_table
from src.engine.reports.images import Gallery
from src.engine.reports.judgement import LESS_IS_BETTER, Evidence, Judgement, changed_command, interval_of, next_step
from src.engine.reports.labels_and_values import labels_of_answers, values_of_answers
from src.engine.reports.rendering import Cell, Link, render
from src.engine.reports.report import CLASSES
from src.engine.runs.files import write_text
from src.engine.runs.intervals import PROPORTIONS
from src.engine.runs.tables import column_titles
from src.engine.runs.text import decimal, plural, printable, shell_word

if TYPE_CHECKING:
    from src.engine.runs.shown import Shown

UNSEEN = "each judged by the run that has not learned from it"


@dataclass(frozen=True)
class Folds:
    """runs, results: the folder and the result.json of each fold. images: how many each was tested on."""

    folder: Path
    result: Mapping[str, Any]  # of all folds
    runs: list[Path]
    results: list[dict[str, Any]]
    images: list[int]

    @classmethod
    def read(cls, folder: Path) -> Folds:
        result, tested = read_json(folder / "result.json"), read_table(folder / "predictions.csv")[1]
        runs, sizes = [folder / name for name in result["runs"]], Counter(row[1] for row in tested)
        images = [sizes[name.removeprefix("fold_")] for name in result["runs"]]
        return cls(folder, result, runs, [read_json(run / "result.json") for run in runs], images)

    def values(self, name: str, baseline: bool = False) -> list[float]:
        """A metric of each fold on its test images; nothing where a fold has none."""
        of = [(result.get("baseline") or {}) if baseline else result for result in self.results]
        found = [(each.get("metrics") or {}).get(f"test/{name}") for each in of]
        return [value for value in found if value is not None] if None not in found else []


def write_folds_report(folder: Path, shown: Shown | None) -> Path:
    """Writes report.html into the folder of all folds, which are finished, and returns its path. shown: the images."""
    folds = Folds.read(folder)
    answers, rows = read_answers(folder / "predictions.csv"), read_rows(folds.runs[0] / "split.csv")
    config = yaml.safe_load((folds.runs[0] / "config.yaml").read_text(encoding="utf-8"))
    config["name"], config["data"]["fold"] = folder.name, None
    known, run = _evidence(folds, config, shown), shell_word(folder.as_posix())
    page = render(
        Path(__file__).parent / "run.html.j2",
        title=folder.absolute().name,
        facts=_facts(config, folds, rows),
        judgement=_judge(folds, known),
        result=folds.result,
        metrics=_table(folds, known.metric),
        images=Gallery.of(shown, [], None, answers),
        counts=None,
        curves=[],
        curves_caption="",
        rates=None,
        confusion=confusion_of(answers, f"images, {UNSEEN},") if answers else None,
        calibration=calibration(answers) if answers else None,
        labels=labels_of_answers(answers, f"Of all images, {UNSEEN}.") if answers else None,
        values=values_of_answers(answers) if answers else None,
        memory=[],
        throughput=None,
        command=folds.result.get("command"),
        settings=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        next_commands=[
            f"python -m src.predict run={run} images=FOLDER_OR_FILE",
            f"python -m src.evaluate run={run} data.root=OTHER_IMAGES",
        ],
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _facts(config: dict[str, Any], folds: Folds, rows: Sequence[Row]) -> list[str]:
    data = config["data"]
    source = " ".join(
        printable(word) for word in (data["source"], data["name"] or data["root"] or data["table"]) if word
    )
    is_of_classes = _task(config) in CLASSES
    in_classes = f" in {len({row['label'] for row in rows})} classes" if is_of_classes else ""
    return [
        f"{config['model']['backbone']} on {source}",
        f"{plural(sum(folds.images), 'image')}{in_classes}",
        f"{len(folds.runs)} folds: each image is tested on once, by a run that has not learned from it",
        f"{folds.result['wall_seconds']:.1f} s",
    ]


def _table(folds: Folds, metric: str) -> tuple[list[str], list[list[Cell]]] | None:
    """Header and rows of the metrics on test: a row per fold, which leads to its own report, their mean and their spread."""
    titles = column_titles(name for name in folds.result["metrics"] if name.startswith("test/"))
    if not titles:
        return None
    columns: dict[str, list[float]] = {}
    for name, title in titles.items():
        columns[title] = folds.values(name)
        if name == metric and (before := folds.values(name, baseline=True)):
            columns["baseline"] = before  # beside what it is to be compared with
    rows: list[list[Cell]] = []
    for number, run in enumerate(folds.runs):
        has_page = (run / "report.html").exists()
        name: Cell = Link(run.name, f"{run.name}/report.html") if has_page else run.name
        rows.append([name, folds.images[number], *(values[number] for values in columns.values())])
    rows.append(["mean", "", *map(statistics.mean, columns.values())])
    rows.append(["std", "", *map(statistics.stdev, columns.values())])
    return ["", "images", *columns], rows


def _evidence(folds: Folds, config: dict[str, Any], shown: Shown | None) -> Evidence:
    """The numbers of all folds, and for what to try next the curves of the fold in the middle."""
    middle = _middle(folds, config)
    baselines = {name: folds.values(name, baseline=True) for name in column_titles(folds.result["metrics"])}
    means = {f"test/{name}": statistics.mean(values) for name, values in baselines.items() if values}
    counts = count(read_rows(folds.runs[middle] / "split.csv"), _task(config))
    return Evidence(
        config=config,
        result=folds.results[middle] | {"metrics": folds.result["metrics"], "baseline": {"metrics": means}},
        epochs=read_columns(folds.runs[middle] / "metrics.csv"),
        images=Counter(test=sum(folds.images)),
        image_size=shown.preprocessing.image_size if shown else None,
        counts=counts.training if counts else {},
        doubts=None,
        command=folds.result.get("command") or "",
    )


def _judge(folds: Folds, known: Evidence) -> Judgement | None:
    """None without numbers."""
    own, other = folds.values(known.metric), folds.values(known.metric, baseline=True)
    if not own:
        return None
    title, total = column_titles([f"test/{known.metric}"])[known.metric], sum(folds.images)
    words = [
        f"The {len(own)} folds reach a mean test {title} of {decimal(statistics.mean(own))}, from {decimal(min(own))} to "
        f"{decimal(max(own))} (standard deviation {decimal(statistics.stdev(own))})."
    ]
    pooled = sum(value * number for value, number in zip(own, folds.images, strict=True)) / max(1, total)
    if interval := interval_of(known.metric, pooled, total):
        low, high = interval
        words.append(f"On all {total:,} images together its 95 % interval is {low:.3g} to {high:.3g}.")
    is_better = None
    if not known.result.get("epochs"):
        words.append("It is the baseline alone, a linear model on the features of the untouched backbone.")
    elif not other:
        words.append("There is no baseline to compare it with, so it is open what training gained.")
    else:
        mean = decimal(statistics.mean(other))
        words.append(f"The baseline, a linear model on the features of the untouched backbone, reaches {mean}.")
        is_better, sentence = _compare(folds, known.metric)
        words.append(sentence)
    advice, change = next_step(known, is_better)
    return Judgement(" ".join(words), advice, changed_command(known.command, change) if change else None)


def _task(config: dict[str, Any]) -> str:
    return config.get("task", {}).get("name", "multiclass")


def _middle(folds: Folds, config: dict[str, Any]) -> int:
    """The number of the fold whose monitored metric is the median, so that its curves stand for all."""
    values = folds.values(config.get("checkpoint", {}).get("monitor", "val/acc").partition("/")[2])
    return sorted(range(len(folds.runs)), key=lambda number: values[number] if values else 0)[len(folds.runs) // 2]


def _compare(folds: Folds, metric: str) -> tuple[bool | None, str]:
    """Whether the runs are better than their baselines (None: the difference may be chance), and that as a sentence.

    By the t-test of Nadeau and Bengio (2003, Machine Learning 52, p. 239): both were measured on the same images, fold by fold,
    and folds share most of their training images, so that their differences vary less than those of other data would.
    """
    own, other = folds.values(metric), folds.values(metric, baseline=True)
    sign = -1 if metric in LESS_IS_BETTER else 1
    gains = [sign * (one - before) for one, before in zip(own, other, strict=True)]
    gain, spread = statistics.mean(gains), statistics.stdev(gains)
    if metric in PROPORTIONS:  # equal differences are no certainty: a fold's share cannot differ by less than an image
        spread = max(spread, len(gains) / sum(folds.images))
    noise = float(student.ppf(0.975, len(gains) - 1)) * spread * math.sqrt(1 / len(gains) + 1 / (len(gains) - 1))
    if abs(gain) <= noise:
        return None, f"The difference of {decimal(abs(gain))} may be chance."
    return gain > 0, f"Training {'gained' if gain > 0 else 'lost'} {decimal(abs(gain))}, which is more than chance."
