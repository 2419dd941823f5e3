"""Names the class of images, or what else the model's task tells about them (docs/tasks.md).

    python -m src.predict run=runs/NAME images=photos/new/      a folder, with its sub-folders
    python -m src.predict run=runs/NAME images=cat.jpg          one image
    python -m src.predict model=model/ images=photos/new/       a copied model/ folder alone, without the run
    python -m src.predict run=[runs/a,runs/b] images=photos/    the mean of several models' answers

Writes predictions.csv (path, class, probability, the five likeliest classes, error; of task=multilabel path, labels, the
probability of each, error; of task=regression path, a column for each value, error) to the folder that the command is run in,
or to out=FILE.csv, and shows the first rows. The file of an earlier prediction is replaced. An image that cannot be read is a
row with its error.

Also: min_confidence=0.8 (a column marks answers with a lower probability as unsure, of several labels where one is), top_k=3
(likeliest classes in a row), tta=flip|five_crop (the mean over an image and its mirror image, or over five crops of it),
batch_size=64, num_workers=N, timeout_seconds=300 (an image that takes longer to read ends the command with its name; 0: no
limit) and accelerator=auto|cpu|gpu|mps.
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys
from dataclasses import dataclass

from src.engine.commands.knobs import choice, number
from src.engine.commands.words import read_words
from src.engine.runs.errors import run_and_report
from src.engine.runs.imports import importing
from src.engine.runs.run_lookup import find_runs_or_models
from src.engine.runs.text import path_in


@dataclass
class Words:
    images: str  # a folder of images, or one
    run: str | None = None  # a run's folder, whose model/ is used, or [one,another]
    model: str | None = None  # or a model/ folder, or several
    out: str = "predictions.csv"  # where to write
    batch_size: int = number(64, 1, 65536)  # images at a time
    num_workers: int | None = number(None, 0, 256, 0)  # null: one per core, 0 for a few images
    timeout_seconds: float = number(300.0, 0, 10**6)  # end the command if an image takes longer; 0: no limit
    accelerator: str = choice("auto", "cpu", "gpu", "mps", default="auto")


@dataclass
class Answers(Words):
    min_confidence: float | None = number(None, 0.0, 1.0, 0.8)  # mark answers that are less sure
    top_k: int | None = number(None, 1, 1000, 3)  # likeliest classes in a row; null: 5
    tta: str = choice("none", "flip", "five_crop", default="none")  # the mean over such views of each image


def work() -> None:
    words, _ = read_words(Answers, sys.argv[1:], "src.predict", __doc__ or "", needed="images")
    _, folders = find_runs_or_models(words.run, words.model, "src.predict")
    with importing():  # after the words are known to be right: torch takes seconds
        from src.engine.runs.ensemble import combined
        from src.engine.runs.prediction import choose_rows, predict
        from src.engine.runs.trained_model import TrainedModel
        from src.models.building import rebuild

    model = combined([TrainedModel.load(folder, rebuild, words.accelerator) for folder in folders], words.tta)
    choose_rows(model.kind, words.min_confidence, words.top_k)
    predict(
        model,
        path_in(words.images),
        path_in(words.out),
        words.batch_size,
        num_workers=words.num_workers,
        timeout_seconds=words.timeout_seconds,
    )


if __name__ == "__main__":
    sys.exit(run_and_report(work))
