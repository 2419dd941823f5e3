"""One of the processes of a run that has several: src/rank.py. launching.py starts it and writes the job to its stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from src.engine.commands import config_checks
from src.engine.commands.schema import Config
from src.engine.runs import run_dir, signals
from src.engine.runs.errors import run_and_report


def main(run: Callable[[Config, Path], object]) -> int:
    """run: what src/run.py does."""
    job = yaml.safe_load(sys.stdin)
    signals.end_with(job["parent"])
    settings, path = config_checks.read(job["config"]), Path(job["path"])
    return run_and_report(lambda: run(settings, path), run_dir.opened)
