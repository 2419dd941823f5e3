"""The README.md of a model/ folder, for whoever gets the folder: a model card (Mitchell et al., 2019, arXiv 1810.03993).

run.py writes it beside what save_model writes. The text is in model_readme.md.j2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from src.engine.commands.schema import Config
from src.engine.runs.intervals import share_interval
from src.engine.runs.model_folder import ModelCard
from src.engine.runs.tables import interval_text
from src.engine.runs.text import decimal, for_markdown
from src.engine.steps.task_kind import TaskKind


@dataclass(frozen=True)
class Origin:
    """How the weights came about."""

    run: str  # its name
    images: Mapping[str, int]  # how many each split has
    started_from: str  # the line that says what the backbone's weights were
    chosen: str  # whose weights these are, such as 'epoch 7'
    epochs: int  # how many were trained
    day: date  # when the training ended
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # test/acc: the 95 % interval
    intervals_by: str | None = None  # group, where these are of resampled groups


def model_readme(card: ModelCard, kind: TaskKind, config: Config, origin: Origin) -> str:
    """The README.md, as Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"markdown": for_markdown, "decimal": decimal, "numbers": _numbers, "between": _between}
    splits = list(dict.fromkeys(key.partition("/")[0] for key in card.metrics))
    metrics = list(dict.fromkeys(key.partition("/")[2] for key in card.metrics))
    measured = splits[-1]  # test, or val where there is none
    accuracy = card.metrics.get(f"{measured}/acc")
    interval = None if accuracy is None else share_interval(accuracy, origin.images[measured])
    return environment.get_template("model_readme.md.j2").render(
        card=card,
        noun=kind.noun,
        purpose=kind.purpose(card.classes),
        reading=kind.reading(card.classes),
        config=config,
        origin=origin,
        steps=card.preprocessing,
        # Only the last part of a path: the rest of it says more about the author's disk than about the images.
        source=config.data.name or Path(config.data.table or config.data.root or "").name,
        metrics=metrics,
        splits=splits,
        measured=measured,
        accuracy=accuracy,
        interval=interval and origin.intervals.get(f"{measured}/acc", interval),
    )


def _between(interval: tuple[float, float] | None) -> str:
    return f" ({interval_text(*interval)})" if interval else ""


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
