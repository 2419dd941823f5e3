"""Makes report.html of a run again, also of an old or interrupted one: what it does not have is left out.

python -m src.report run=runs/NAME                  the page again, from the files in the run's folder and its images; of all
                                                    folds too, where NAME is that of data.folds
python -m src.report run=runs/NAME explain=true     with what the network looked at in its mistakes (Grad-CAM)
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys
from dataclasses import dataclass

from src import rules  # noqa: F401 (registers the settings)
from src.engine.commands.knobs import choice
from src.engine.commands.words import read_words
from src.engine.runs.errors import run_and_report
from src.engine.runs.imports import importing
from src.engine.runs.run_lookup import find_run


@dataclass
class Words:
    run: str  # its folder
    explain: str | None = choice("true", "false", default=None)  # default: the run's report.explain


def work() -> None:
    words, _ = read_words(Words, sys.argv[1:], "src.report", __doc__ or "", needed="run")
    run = find_run(words.run, needs_model=False)
    with importing():  # after the words are known to be right: torch takes seconds
        from src.data import sources, transforms
        from src.engine.reports.remaking import Parts, remake
        from src.models import building
        from src.models.freezing import FreezePlan
        from src.tasks.building import build_task_kind

    remake(run, words.explain, Parts(sources, building, build_task_kind, transforms.train_transform, FreezePlan.of))


if __name__ == "__main__":
    sys.exit(run_and_report(work))
