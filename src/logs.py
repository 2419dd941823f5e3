"""What goes to the screen and what to train.log: messages of this project to both, everything else to the file."""

from __future__ import annotations

import logging
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
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)


@contextmanager
def logging_to(file: Path | None) -> Iterator[None]:
    """Inside, log messages are printed and kept in the file; the handlers are removed at the end (a sweep runs many jobs)."""
    root = logging.getLogger()
    before = root.level
    handlers: list[logging.Handler] = [_console()]
    if file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(to_file)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
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
        root.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _console() -> logging.Handler:
    """Our own messages as they are, other libraries' warnings with their name; Python warnings only in the file."""
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(
        lambda record: (
            record.name.startswith("src") or (record.levelno >= logging.WARNING and record.name != "py.warnings")
        )
    )
    handler.setFormatter(_Plain())
    return handler


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            return text
        source = "" if record.name.startswith("src") else f"{record.name}: "
        return f"{'WARNING' if record.levelno < logging.ERROR else 'ERROR'}  {source}{text}"
