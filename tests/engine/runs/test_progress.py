"""On a terminal a bar of the epoch at hand, and when it is over only the epoch's line."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import torch

from src.engine.runs.progress import EpochLines
from tests.conftest import SMALL, command_environment


def on_a_terminal(folder, *words: str) -> str:
    """What `python -m src.train words...` writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", *words],
        cwd=folder,
        stdout=theirs,
        stderr=theirs,
        env=command_environment() | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_a_bar_while_it_trains_and_a_line_when_the_epoch_is_over(command, tmp_path):
    written = on_a_terminal(tmp_path, *SMALL, "name=x")
    assert "epoch 1/2 training" in written
    assert "epoch 2/2 validating" in written
    lines = [line for line in written.split("\n") if "train loss" in line]
    assert len(lines) == 2
    for line in lines:  # nothing of the bar is left in the line: the cursor was brought back and the bar erased
        assert line.rpartition("\x1b[2K")[2].lstrip("\r").startswith("epoch ")
    assert "\x1b" not in command("train", *SMALL, "name=y").out


def test_a_long_run_shows_some_of_its_epochs_and_the_time_left(monkeypatch, caplog):
    clock = iter(range(0, 10**6, 5))
    monkeypatch.setattr("src.engine.runs.progress.time.monotonic", lambda: next(clock))
    metrics = {"train/loss": torch.tensor(1.0), "train/acc": torch.tensor(0.5)}
    trainer = SimpleNamespace(callback_metrics=metrics, max_epochs=125, is_global_zero=True)
    lines = EpochLines()
    caplog.set_level("INFO")
    for trainer.current_epoch in range(125):
        lines.on_train_epoch_end(trainer, None)
    shown = [int(message.split("/")[0].removeprefix("epoch")) for message in caplog.messages]
    assert shown == [1, *range(3, 125, 3), 125]
    assert caplog.messages[0].endswith("acc 0.5000    "), "the first epoch may be shorter than the others"
    assert caplog.messages[1].endswith("10 min left")
    assert "left" not in caplog.messages[-1]
