"""What goes to the screen and what to train.log: messages of this project to both, everything else to the file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Warnings of libraries that are about our own choices and that a user can do nothing about.
NOISE = (
    ".*does not have many workers which may be a bottleneck.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*Found .* module.* in eval mode at the start of training.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Detected call of .lr_scheduler.step.. before .optimizer.step...*",  # fp16's first steps may overflow and be skipped
    ".*It is recommended to use .*sync_dist=True.*",  # what is logged is the same in all processes already
    ".*`broadcast_buffers` is deprecated.*",  # what replaces it is not in torch 2.10
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)

IN_FILES = ("py.warnings", "ray")  # what a sweep has to say of its trials it says itself


def to_screen() -> None:
    """Prints log messages, once for the whole command: of several processes only the first prints more than errors."""
    root = logging.getLogger()
    if not any(isinstance(handler, _Screen) for handler in root.handlers):
        screen = _Screen()
        screen.setLevel(logging.NOTSET if os.environ.get("RANK", "0") == "0" else logging.ERROR)
        root.addHandler(screen)
        root.setLevel(logging.INFO)


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Inside, log messages and Python warnings are kept in the file too; a sweep writes many, one after another."""
    handler = _File(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    for name in ("lightning.pytorch", "lightning.fabric"):  # they print by themselves what they also hand on
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.captureWarnings(True)
    for text in NOISE:
        warnings.filterwarnings("ignore", message=text)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
        handler.close()


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk must not fill the screen with a traceback per message."""


class _Screen(logging.StreamHandler):
    """Our own messages as they are, other libraries' warnings with their name; Python warnings only go to the file."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.addFilter(_worth_showing)
        self.setFormatter(_Plain())


def _worth_showing(record: logging.LogRecord) -> bool:
    return record.name.startswith("src") or (record.levelno >= logging.WARNING and not record.name.startswith(IN_FILES))


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            return text
        source = "" if record.name.startswith("src") else f"{record.name}: "
        return f"{'WARNING' if record.levelno < logging.ERROR else 'ERROR'}  {source}{text}"
