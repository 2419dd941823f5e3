"""Environment variables that switch off Ray's own output, signals and spare processes. Ray reads most at its import."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.engine.runs.errors import Terminated

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's table; ours is src/engine/sweeps/progress.py
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # its files of results; ours is trials.jsonl
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # after it Ctrl-C ends with exit code 0
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",  # we say which trial it was
    "RAY_prestart_worker_first_driver": "0",  # a process per core before the first trial; Tune's trials take none of them
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what a trial without a GPU sees; else a warning about a change to come
}


@contextmanager
def own_handlers() -> Iterator[None]:
    """Keeps our handler of SIGTERM. Importing and starting Ray set others, which end a command with exit code 15 or 1."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        raise Terminated from error
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_ray(address: str | None) -> None:
    """Sets the variables that the user has not set. address: of the Ray cluster to join; None: Ray is started here.

    Ray listens on every address of the machine and runs the code of whoever has its token; its older versions ask for a
    token only where they are told to. The token of a Ray of ours is in the environment of this command and its processes,
    which other users cannot read. Ray itself would write it to ~/.ray/auth_token, which they can.
    """
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    elif (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
