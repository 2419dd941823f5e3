"""One of the processes of a run that has several; src/strategies/launching.py starts it and writes the job to its stdin.

Not for people: python -m src.train strategy=ddp trainer.devices=2 starts these.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import yaml

from src import config_checks
from src.errors import ExitCode, run_and_report


def main() -> int:
    job = yaml.safe_load(sys.stdin)
    end_with(job["parent"])
    settings, path = config_checks.read(job["config"]), Path(job["path"])

    def work() -> None:
        from src.run import run

        run(settings, path)

    return run_and_report(work, lambda: path if os.environ["RANK"] == "0" else None)


def end_with(parent: int) -> None:
    """Ends this process soon after the one that started it, in whatever way that ended: nobody else would.

    Windows keeps the number of a parent that is gone; there the broken connections between the processes end them."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(ExitCode.PROCESS_LOST)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True, name="end_with_parent").start()


if __name__ == "__main__":
    sys.exit(main())
