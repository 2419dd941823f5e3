"""Logging: messages of this project go to the screen and to train.log, all others to the file only."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from src.engine.runs.text import printable_lines

# Warnings of libraries about this project's own choices, on which a user cannot act.
NOISE = (
    ".*does not have many workers which may be a bottleneck.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*Found .* module.* in eval mode at the start of training.*",
    ".*Detected call of .lr_scheduler.step.. before .optimizer.step...*",  # fp16's first steps may overflow and be skipped
    ".*It is recommended to use .*sync_dist=True.*",  # all ranks log the same values already
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)

# Hydra 1.4 with omegaconf 2.4 deprecates what Hydra 1.3 with omegaconf 2.3 needs.
MIGRATION = ("The version_base parameter is deprecated", r"register_new_resolver\(\) is deprecated")

IN_FILES = ("py.warnings", "ray")  # kept out of the screen: a sweep prints its own messages about trials


def to_screen() -> None:
    """Prints log messages from here on; ranks other than 0 print errors only.

    Characters that the console's encoding lacks are printed as escapes.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: `>&-`, or a program without a console
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - stays open, as the stream would
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    ignore_warnings(MIGRATION)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # "Error getting object at": our message says it
    root = logging.getLogger()
    if not any(isinstance(handler, _Screen) for handler in root.handlers):
        screen = _Screen()
        screen.setLevel(logging.NOTSET if os.environ.get("RANK", "0") == "0" else logging.ERROR)
        root.addHandler(screen)
        root.setLevel(logging.INFO)


def ignore_warnings(messages: Sequence[str]) -> None:
    """messages: regular expressions for how the warnings begin."""
    for message in messages:
        warnings.filterwarnings("ignore", message=message)


def say(text: str) -> None:
    """Prints to stderr, if it can be written."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def flush_screen() -> OSError | None:
    """Flushes stdout and stderr at the end of a command. Returns the error if they cannot be written; a reader that went
    away (`| head`) is no error."""
    unwritten = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            unwritten = unwritten if isinstance(error, BrokenPipeError) else error
            _silence(stream)
        except ValueError:  # closed
            pass
    return unwritten


def is_screen_gone() -> bool:
    """Whether stdout can no longer be written, as in `> /dev/full` or after `| head`. Prints an empty line to find out."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except ValueError:  # closed, or a notebook's, which has no file
        return False
    except OSError:
        _silence(sys.stdout)
        return True
    return False


def _silence(stream: TextIO) -> None:
    """Redirects the stream, with the contents of its buffer, to nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Inside, log messages and Python warnings also go to the file."""
    handler = _File(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    for name in ("lightning.pytorch", "lightning.fabric"):  # they have handlers of their own
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.captureWarnings(True)
    ignore_warnings(NOISE)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
        handler.close()


class _File(logging.FileHandler):
    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk must not fill the screen with a traceback per message."""


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == "src"


class _Screen(logging.StreamHandler):
    """Prints this project's messages as they are, other libraries' warnings with their name, and no Python warnings."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def filter(self, record: logging.LogRecord) -> bool:
        return _is_ours(record) or (record.levelno >= logging.WARNING and not record.name.startswith(IN_FILES))

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            source = "" if _is_ours(record) else f"{record.name}: "
            text = f"{'WARNING' if record.levelno < logging.ERROR else 'ERROR'}  {source}{text}"
        return printable_lines(text)

    def handleError(self, record: logging.LogRecord) -> None:
        """Lets the work go on if the reader went away (`| head`) or the disk is full; the run's log has all messages."""
        if isinstance(sys.exc_info()[1], OSError):
            _silence(self.stream)
        else:
            super().handleError(record)
