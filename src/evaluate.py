"""Measures a run's model again, or measures it on other images.

    python -m src.evaluate run=runs/NAME                        the test images of the run: the numbers it printed
    python -m src.evaluate run=runs/NAME split=val              another split: train, val, test
    python -m src.evaluate run=runs/NAME data.root=other/       other images of the same classes
    python -m src.evaluate run=runs/NAME data.batch_size=16     any data. setting of the run can be changed

Also: out=FOLDER (where the numbers go; default: the run's folder) and accelerator=auto|cpu|gpu|mps. Writes
evaluation_SPLIT.json and its confusion matrix, of other images evaluation_SPLIT_FOLDER.json; evaluation.json is the
newest of them. The model, its classes, their order and its preprocessing are the run's own.
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys
from dataclasses import dataclass

from src import rules  # noqa: F401 (registers the settings)
from src.engine.commands import config_checks
from src.engine.commands.knobs import choice
from src.engine.commands.words import check_effects, read_words
from src.engine.runs.errors import run_and_report
from src.engine.runs.run_dir import refuse_links
from src.engine.runs.run_lookup import find_run
from src.engine.runs.run_settings import merged, stored_settings
from src.engine.runs.text import path_in


@dataclass
class Words:
    run: str  # the run's folder
    split: str | None = choice("train", "val", "test", default=None)  # default: test, or val where there is no test
    out: str | None = None  # where to write; default: the run's folder
    accelerator: str = choice("auto", "cpu", "gpu", "mps", default="auto")


def work() -> None:
    words, changes = read_words(Words, sys.argv[1:], "src.evaluate", __doc__ or "", needed="run", data=True)
    run = find_run(words.run)
    if words.out is None:
        refuse_links(run, "evaluation*")
    settings = config_checks.read(merged(stored_settings(run), changes))
    check_effects(changes, settings.data.source)
    # After the words are known to be right: torch takes seconds to import.
    from src.data import sources
    from src.engine.runs.evaluation import Evaluation, evaluate_run
    from src.engine.runs.trained_model import TrainedModel
    from src.models.building import build_loss, rebuild

    out = path_in(words.out) if words.out else run
    precision, threads = settings.precision.name, settings.trainer.threads
    model = TrainedModel.load(run / "model", rebuild, words.accelerator, precision, threads)
    evaluate_run(Evaluation(run, settings, changes, words.split, out), model, sources, build_loss)


if __name__ == "__main__":
    sys.exit(run_and_report(work))
