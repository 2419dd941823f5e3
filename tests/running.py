"""Trainings in the background, for tests that send them signals or wait for their files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.reference_runs import POSITIONS, Reference, run
from tests.conftest import ROOT, command_environment


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def check_kill(*words: str, tree: Path = ROOT) -> None:
    """A run that is killed in its fifth step and repeated ends as an undisturbed one, to the bit. tree: whose src.train."""
    command = [*words, *POSITIONS, "name=run"]
    whole, killed = run(Reference([command]), tree), run(Reference([command] * 2, disturbed="killed"), tree)
    assert (whole["codes"], killed["codes"]) == ([0], [-9, 0])
    assert whole["weights"]
    assert killed["weights"] == whole["weights"]
    assert killed["metrics"] == whole["metrics"]


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
    """A training as the leader of its own process group, so that a test can send it signals."""
    return subprocess.Popen(
        [sys.executable, "-m", "src.train", *words],
        cwd=folder,
        env=command_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )


def wait_for_save(run: Path, after_epoch: int, process: subprocess.Popen) -> bool:
    """Waits until the run has saved a position in mid-epoch; False if it ended before."""
    rows, last, seen = run / "metrics.csv", run / "checkpoints" / "last.ckpt", None
    while process.poll() is None:
        if rows.exists() and len(rows.read_text().splitlines()) > after_epoch and last.exists():
            try:
                stamp = last.stat().st_mtime_ns
            except FileNotFoundError:  # between the two renames of a save
                continue
            if seen is not None and stamp != seen:
                return True
            seen = stamp
        time.sleep(0.002)
    return False


def wait_for_rows(run: Path, rows: int, process: subprocess.Popen) -> bool:
    """Waits until metrics.csv has this many rows; False if the run ended before."""
    while process.poll() is None:
        file = run / "metrics.csv"
        if file.exists() and len(file.read_text().splitlines()) > rows:
            return True
        time.sleep(0.01)
    return False
