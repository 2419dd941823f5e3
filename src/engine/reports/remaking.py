"""report.html of a run again: the work of src/report.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from src.engine.commands import config_checks
from src.engine.commands.knobs import ANY
from src.engine.commands.schema import Config
from src.engine.images.reading import ReadOptions, read_image
from src.engine.images.resizing import Transform
from src.engine.images.sources import ImageSources
from src.engine.own import is_own
from src.engine.reports.folds_report import write_folds_report
from src.engine.reports.judgement import changed_command
from src.engine.reports.report import write_report
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.run_dir import read_result, refuse_links
from src.engine.runs.run_lookup import fold_runs, has_model
from src.engine.runs.run_settings import merged, stored_settings
from src.engine.runs.shown import Shown, read_by_name
from src.engine.runs.text import printable
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.task_kind import TaskKind
from src.engine.weights.preprocessing import Preprocessing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What src/ outside of the engine builds of a run's settings."""

    sources: ImageSources
    building: Any  # the module src/models/building.py
    task_kind: Callable[[Any], TaskKind]
    training: Callable[[Preprocessing, str], Transform]
    plan: Callable[..., Any]


def remake(run: Path, explain: str | None, parts: Parts) -> None:
    """explain: true or false; None: as the run's settings say. Raises UserError."""
    refuse_links(run, "report.html")
    if fold_runs(run):
        page = _remake_folds(run, explain, parts)
        log.info(f"look at   {printable(page)}")
        return
    changes = {} if explain is None else {"report.explain": explain == "true"}
    stored, phases, shown = merged(stored_settings(run), changes), None, None
    model = TrainedModel.load(run / "model", parts.building.rebuild) if has_model(run) else None
    try:
        settings = config_checks.read(stored)  # refuses a data.root that is gone
        if model is not None:
            phases = parts.plan(settings.freeze, model.network.backbone, ANY).phases  # phases that were reached or not
        shown = _shown(run, settings, model, parts)
    except (UserError, OSError) as error:
        log.warning(f"The page has no images: {error}")
    missing = {
        "the images are not at hand": shown is None,
        "the run has no model/ yet": model is None,
        "the run is older than predictions.csv": not (run / "predictions.csv").exists(),
    }
    if stored["report"]["explain"] and any(missing.values()):
        log.warning(f"explain=true has no effect: {'; '.join(why for why, is_so in missing.items() if is_so)}.")
    page = write_report(run, phases, None, shown)
    log.info(f"look at   {printable(page)}")


def _remake_folds(run: Path, explain: str | None, parts: Parts) -> Path:
    first, shown = _finished_folds(run)[0], None
    if explain == "true":
        log.warning(
            "explain=true has no effect: each fold has a network of its own, and a report that shows what it looked at."
        )
    try:
        settings = config_checks.read(merged(stored_settings(first), {"report.explain": False}))
        model = TrainedModel.load(first / "model", parts.building.rebuild) if has_model(first) else None
        shown = _shown(first, settings, model, parts)
    except (UserError, OSError) as error:
        log.warning(f"The page has no images: {error}")
    return write_folds_report(run, shown)


def _finished_folds(run: Path) -> list[Path]:
    """Raises UserError where a fold is not finished, or no command has summed them up."""
    folds, result = fold_runs(run), read_result(run)
    if result.get("state") == "finished" and result.get("runs") == [fold.name for fold in folds]:
        return folds
    settings, command = stored_settings(folds[0]), str(read_result(folds[0]).get("command", ""))
    ended = sum(read_result(fold).get("state") == "finished" for fold in folds)
    name = str(settings["name"]).rpartition("/")[0] or run.name  # of cv/fold_0
    words = [f"name={name}", *(["data.fold=null"] if "data.fold=" in command else [])]
    raise UserError(
        f"{ended} of the {settings['data']['folds']} folds of {printable(run.name)} are finished",
        where=str(run.absolute()),
        why="their report is of all folds, and is made by the command that trains them, or sums up those that are trained",
        fix=changed_command(command, words),
        code=ExitCode.NO_INPUT,
    )


def _shown(run: Path, settings: Config, model: TrainedModel | None, parts: Parts) -> Shown:
    if model is None:
        kind, preprocessing = (
            parts.task_kind(settings.task),
            parts.building.choose_preprocessing(settings.model, settings.data),
        )
        red, green, blue = settings.data.background
        options = ReadOptions((red, green, blue), settings.data.max_megapixels)
    else:
        kind, preprocessing, options = model.kind, model.card.preprocessing, model.card.read_options
    read = _reader(run, settings, kind, options, parts.sources)
    return Shown(settings, read, preprocessing, parts.training(preprocessing, settings.data.augment), model)


def _reader(
    run: Path, settings: Config, kind: TaskKind, options: ReadOptions, sources: ImageSources
) -> Callable[[str], Tensor]:
    """A path of split.csv -> uint8 (3, H, W). Of files only those that are asked for are opened."""
    data = settings.data
    if not is_own(data.source) and sources.lists_files(data, kind):
        root = sources.image_root(data, kind)
        return lambda name: read_image(root / name, options)
    images = sources.load_images(
        replace(data, on_bad_image="skip"),
        kind,
        settings.seed,
        cache_dir=Path(settings.runs_dir) / ".checked",
        run_split=run / "split.csv",
    )
    return read_by_name(images)
