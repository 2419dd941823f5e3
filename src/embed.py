"""Writes what a model's backbone makes of images: their features, for a search for similar images, clustering or a plot.

    python -m src.embed run=runs/NAME images=photos/            features.npz: paths (N,), features float32 (N, F)
    python -m src.embed run=runs/NAME images=photos/ out=f.csv  a row per image: path, feature_0, feature_1, ...
    python -m src.embed model=model/ images=photos/             a model/ folder alone, without the run

An image that cannot be read is named and left out. Also, as with src.predict: batch_size, num_workers, timeout_seconds and
accelerator.
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys
from dataclasses import dataclass

from src import predict
from src.engine.commands.words import read_words
from src.engine.runs.errors import run_and_report
from src.engine.runs.imports import importing
from src.engine.runs.run_lookup import find_run_or_model
from src.engine.runs.text import path_in


@dataclass
class Words(predict.Words):
    out: str = "features.npz"  # or a name that ends in .csv


def work() -> None:
    words, _ = read_words(Words, sys.argv[1:], "src.embed", __doc__ or "", needed="images")
    _, folder = find_run_or_model(words.run, words.model, "src.embed")
    with importing():  # after the words are known to be right: torch takes seconds
        from src.engine.runs.embedding import embed
        from src.engine.runs.trained_model import TrainedModel
        from src.models.building import rebuild

    loading = words.batch_size, words.num_workers, words.timeout_seconds
    embed(TrainedModel.load(folder, rebuild, words.accelerator), path_in(words.images), path_in(words.out), *loading)


if __name__ == "__main__":
    sys.exit(run_and_report(work))
