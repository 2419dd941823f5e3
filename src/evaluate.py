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
from src.engine.commands.user_command import corrected
from src.engine.commands.words import read_words
from src.engine.runs.errors import UserError, run_and_report
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
    _check_effects(changes, settings.data.source)
    from src.engine.runs.evaluation import (
        evaluate_run,  # after the words are known to be right: torch takes seconds to import
    )

    evaluate_run(run, settings, changes, words.split, path_in(words.out) if words.out else run, words.accelerator)


ABOUT_OTHER_IMAGES = {  # settings without effect on the run's own images
    "data.on_bad_image": "of the run's own images, what cannot be read any more is left out and counted",
    "data.layout": "it says how the folders below data.root are read",
}


def _check_effects(changes: dict[str, object], source: str) -> None:
    if source not in ("image_folder", "table") or "data.root" in changes or "data.table" in changes:
        return
    for key, why in ABOUT_OTHER_IMAGES.items():
        if key in changes:
            raise UserError(f"{key} has no effect here", why=why, fix=corrected(remove=[key]))


if __name__ == "__main__":
    sys.exit(run_and_report(work))
