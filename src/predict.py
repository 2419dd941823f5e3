"""Names the class of pictures.

    python -m src.predict run=runs/NAME images=photos/new/      a folder, with its sub-folders
    python -m src.predict run=runs/NAME images=cat.jpg          one picture
    python -m src.predict model=model/ images=photos/new/       a copied model/ folder alone, without the run

Writes predictions.csv (path, class, probability, the five likeliest classes, error) to the current folder, or to
out=FILE.csv, and shows the first rows. A picture that cannot be read is a row with its error. Also: batch_size=64,
num_workers=N and accelerator=auto|cpu|gpu|mps.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from src.command_line import read_words
from src.errors import UserError, run_and_report


@dataclass
class Words:
    run: str | None = None  # a run's folder; its model/ is used
    model: str | None = None  # or a model/ folder
    images: str | None = None  # a folder of pictures, or one
    out: str = "predictions.csv"  # where to write
    batch_size: int = 64  # pictures at a time
    num_workers: int | None = None  # loader processes; null: one per core, 0 for a few pictures
    accelerator: str = "auto"  # auto, cpu, gpu, mps


def work() -> None:
    words, overrides = read_words(Words, sys.argv[1:], "src.predict", __doc__ or "", needed="images")
    if overrides or (words.run is None) == (words.model is None):
        raise UserError(
            f"{overrides[0]} is not a setting of src.predict" if overrides else "either run= or model= must be given",
            why="run= is the folder of a run, model= the model/ folder of one, wherever it was copied to",
            fix=f"python -m src.predict run=runs/NAME images={words.images}",
        )
    from src.prediction import predict  # after the words are known to be right: torch takes seconds to import

    predict(
        Path(words.model) if words.model else Path(words.run or "") / "model",
        Path(words.images or ""),
        Path(words.out),
        words.batch_size,
        words.num_workers,
        words.accelerator,
    )


if __name__ == "__main__":
    sys.exit(run_and_report(work))
