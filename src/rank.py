"""One of the processes of a run that has several (src/engine/processes/launching.py).

Not for people: python -m src.train strategy=ddp trainer.devices=2 starts these.
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys
from pathlib import Path

from src import rules  # noqa: F401 (registers the settings)
from src.config import Config
from src.engine.processes import rank
from src.engine.runs.imports import importing


def run(settings: Config, path: Path) -> None:
    with importing():  # here an error of the import is reported as the run's
        from src.run import rehearse, run

    (rehearse if sys.argv[1:] == ["rehearsal"] else run)(settings, path)


if __name__ == "__main__":
    sys.exit(rank.main(run))
