"""Names the class of images, or what else the model's task tells about them (docs/tasks.md).

    python -m src.predict run=runs/NAME images=photos/new/      a folder, with its sub-folders
    python -m src.predict run=runs/NAME images=cat.jpg          one image
    python -m src.predict model=model/ images=photos/new/       a copied model/ folder alone, without the run

Writes predictions.csv (path, class, probability, the five likeliest classes, error; of task=multilabel path, labels, the
probability of each, error; of task=regression path, a column for each value, error) to the folder that the command is run in,
or to out=FILE.csv, and shows the first rows. The file of an earlier prediction is replaced. An image that cannot be read is a
row with its error. Also: batch_size=64, num_workers=N, timeout_seconds=300 (an image that takes longer to read ends the
command with its name; 0: no limit) and accelerator=auto|cpu|gpu|mps.
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
from src.engine.runs.run_lookup import find_run_or_model
from src.engine.runs.text import path_in


@dataclass
class Words:
    images: str  # a folder of images, or one
    run: str | None = None  # a run's folder; its model/ is used
    model: str | None = None  # or a model/ folder
    out: str = "predictions.csv"  # where to write
    batch_size: int = number(64, 1, 65536)  # images at a time
    num_workers: int | None = number(None, 0, 256, 0)  # null: one per core, 0 for a few images
    timeout_seconds: float = number(300.0, 0, 10**6)  # end the command if an image takes longer; 0: no limit
    accelerator: str = choice("auto", "cpu", "gpu", "mps", default="auto")


def work() -> None:
    words, _ = read_words(Words, sys.argv[1:], "src.predict", __doc__ or "", needed="images")
    _, model = find_run_or_model(words.run, words.model, "src.predict")
    with importing():  # after the words are known to be right: torch takes seconds
        from src.engine.runs.prediction import predict
        from src.engine.runs.trained_model import TrainedModel
        from src.models.building import rebuild

    predict(
        TrainedModel.load(model, rebuild, words.accelerator),
        path_in(words.images),
        path_in(words.out),
        words.batch_size,
        num_workers=words.num_workers,
        timeout_seconds=words.timeout_seconds,
    )


if __name__ == "__main__":
    sys.exit(run_and_report(work))
