"""Measures a run's model again, or measures it on other images.

    python -m src.evaluate run=runs/NAME                        the test images of the run: the numbers it printed
    python -m src.evaluate run=runs/NAME split=val              another split: train, val, test
    python -m src.evaluate run=runs/NAME data.root=other/       other images of the same classes
    python -m src.evaluate run=runs/NAME data.batch_size=16     any data. setting of the run can be changed
    python -m src.evaluate run=[runs/a,runs/b]                  the mean of several models, on the images of the first run
    python -m src.evaluate model=pets/model data.root=other/    a model/ folder without its run, on images of its classes

Also: tta=flip|five_crop (the mean over an image and its mirror image, or over five crops of it), out=FOLDER (where the
numbers go; default: the run's folder, or this one) and accelerator=auto|cpu|gpu|mps. Writes evaluation_SPLIT.json, its
confusion matrix and its predictions, a row per image; of other images evaluation_SPLIT_FOLDER.json. evaluation.json is the
newest of them. The model, its classes, their order and its preprocessing are the run's own.
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys
from dataclasses import dataclass
from pathlib import Path

from src import rules  # noqa: F401 (registers the settings)
from src.engine.commands import config_checks
from src.engine.commands.knobs import choice
from src.engine.commands.user_command import corrected
from src.engine.commands.words import check_effects, read_words
from src.engine.runs.errors import UserError, run_and_report
from src.engine.runs.imports import importing
from src.engine.runs.run_dir import refuse_links
from src.engine.runs.run_lookup import find_runs_or_models
from src.engine.runs.run_settings import merged, settings_without_run, stored_settings
from src.engine.runs.text import path_in


@dataclass
class Words:
    run: str | None = None  # the run's folder, or [one,another]
    model: str | None = None  # or a model/ folder, or several
    split: str | None = choice("train", "val", "test", default=None)  # default: test, or val where there is no test
    tta: str = choice("none", "flip", "five_crop", default="none")  # the mean over such views of each image
    out: str | None = None  # where to write; default: the run's folder
    accelerator: str = choice("auto", "cpu", "gpu", "mps", default="auto")


def work() -> None:
    words, changes = read_words(Words, sys.argv[1:], "src.evaluate", __doc__ or "", data=True)
    runs, folders = find_runs_or_models(words.run, words.model, "src.evaluate")
    run = runs[0] if runs else None
    if run is None and not {"data.root", "data.table", "data.source"} & {*changes}:
        raise UserError("model= needs images to measure it on", fix=corrected("data.root=photos/"))
    if words.out is None:
        refuse_links(run or Path(), "evaluation*")
    stored = stored_settings(run) if run else settings_without_run(changes)
    settings = config_checks.read(merged(stored, changes))
    check_effects(changes, settings.data.source)
    with importing():  # after the words are known to be right: torch takes seconds
        from src.data import sources
        from src.engine.runs.ensemble import combined
        from src.engine.runs.evaluation import Evaluation, evaluate_run
        from src.engine.runs.trained_model import TrainedModel
        from src.models.building import rebuild

    out = path_in(words.out) if words.out else run or Path()
    precision, threads = settings.precision.name if run else "auto", settings.trainer.threads
    precision = None if precision == "auto" else precision  # that of the training
    members = [TrainedModel.load(folder, rebuild, words.accelerator, precision, threads) for folder in folders]
    asked = Evaluation(run, settings, changes, words.split, out, tuple(runs[1:]))
    evaluate_run(asked, combined(members, words.tta), sources)


if __name__ == "__main__":
    sys.exit(run_and_report(work))
