"""One of the processes of a run that has several; src/engine/processes/launching.py starts it and writes the job to its stdin.

Not for people: python -m src.train strategy=ddp trainer.devices=2 starts these.
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys
from pathlib import Path

import yaml

from src.engine.commands import config_checks
from src.engine.processes.launching import end_with
from src.engine.runs import run_dir
from src.engine.runs.errors import run_and_report


def main() -> int:
    job = yaml.safe_load(sys.stdin)
    end_with(job["parent"])
    settings, path = config_checks.read(job["config"]), Path(job["path"])

    def work() -> None:
        from src.run import run

        run(settings, path)

    return run_and_report(work, run_dir.opened)


if __name__ == "__main__":
    sys.exit(main())
