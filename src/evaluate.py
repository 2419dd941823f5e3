"""Measures a run's model again, or measures it on other pictures.

    python -m src.evaluate run=runs/NAME                        the test pictures of the run: the numbers it printed
    python -m src.evaluate run=runs/NAME split=val              another split: train, val, test
    python -m src.evaluate run=runs/NAME data.root=other/       other pictures of the same classes
    python -m src.evaluate run=runs/NAME data.batch_size=16     any data. setting of the run can be changed

Also: out=FOLDER (where evaluation.json and evaluation_confusion.csv go; default: the run's folder) and
accelerator=auto|cpu|gpu|mps. The model, its classes, their order and its preprocessing are the run's own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from src.command_line import read_words
from src.errors import run_and_report


@dataclass
class Words:
    run: str | None = None  # the run's folder
    split: str | None = None  # train, val or test; default: test, or val where there is no test
    out: str | None = None  # where to write; default: the run's folder
    accelerator: str = "auto"  # auto, cpu, gpu, mps


def work() -> None:
    words, overrides = read_words(Words, sys.argv[1:], "src.evaluate", __doc__ or "", needed="run")
    from src.evaluation import evaluate_run  # after the words are known to be right: torch takes seconds to import

    out = Path(words.out) if words.out else None
    evaluate_run(Path(words.run or ""), words.split, overrides, out, words.accelerator)


if __name__ == "__main__":
    sys.exit(run_and_report(work))
