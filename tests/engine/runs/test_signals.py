"""What signals do to a command before, while and after it works: in processes of their own, with real signals."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
import signal
import subprocess
import sys
import time

import pytest

import src
from src.engine.runs.errors import ExitCode, UserError
from tests.warm import ROOT

HEAD = """
import os, signal, sys, time
from src.engine.runs import signals
from src.engine.runs.errors import run_and_report
signals.END_SECONDS = 1.0
def me(number): os.kill(os.getpid(), number)
"""


def ended(program: str) -> tuple[int, str]:
    """Exit code of a Python program, and what it printed to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 143)])
@pytest.mark.parametrize(
    "program",
    [
        "signals.end_at_once(); me({}); time.sleep(20)",
        "sys.exit(run_and_report(lambda: (me({0}), time.sleep(20))))",
        # ignored while the command tidies up
        """
def work():
    try:
        me({0})
        time.sleep(20)
    finally:
        me({0})
        print("tidied up", file=sys.stderr)
sys.exit(run_and_report(work))
""",
        # while the interpreter ends
        """
import atexit
signals.end_at_once()
atexit.register(lambda: (me({0}), time.sleep(0.1)))
sys.exit(run_and_report(lambda: (me({0}), time.sleep(20))))
""",
        # an import in C makes an ImportError of it
        """
def work():
    try:
        me({0})
        time.sleep(20)
    except BaseException:
        raise ImportError("numpy failed to import")
sys.exit(run_and_report(work))
""",
        # swallowed, as by a finalizer
        """
class Finalizer:
    def __del__(self):
        me({0})
        time.sleep(0.1)
sys.unraisablehook = lambda raised: None
def work():
    Finalizer()
    time.sleep(20)
sys.exit(run_and_report(work))
""",
    ],
    ids=["importing", "working", "tidying up", "at its end", "translated", "swallowed"],
)
def test_a_signal_ends_a_command_with_its_code(program, number, code):
    start = time.monotonic()
    returned, printed = ended(program.format(f"signal.{number}"))
    assert returned == code, printed
    assert time.monotonic() - start < 15
    if "tidied" in program:
        assert "tidied up" in printed


def test_an_error_that_the_user_has_to_know_is_told_also_after_a_signal():
    returned, printed = ended("""
from src.engine.runs.errors import ExitCode, UserError
def work():
    try:
        me(signal.SIGTERM)
    finally:
        raise UserError("the disk is full", code=ExitCode.CANNOT_WRITE)
sys.exit(run_and_report(work))
""")
    assert returned == ExitCode.CANNOT_WRITE
    assert "the disk is full" in printed


def test_the_handlers_of_the_caller_are_back_afterwards():
    before = [signal.getsignal(number) for number in src.engine.runs.signals.NUMBERS]
    assert src.engine.runs.errors.run_and_report(lambda: None) == 0
    assert [signal.getsignal(number) for number in src.engine.runs.signals.NUMBERS] == before


def own_exceptions() -> list[type[BaseException]]:
    found = set()
    for module in pkgutil.walk_packages(src.__path__, "src."):
        if ".plugins" not in module.name:
            classes = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
            found |= {
                kind for _, kind in classes if issubclass(kind, BaseException) and kind.__module__.startswith("src.")
            }
    return sorted(found, key=str)


def test_every_exception_of_ours_travels_between_processes():
    """A trial's error comes out of Ray's pickles, a loader process's out of torch's."""
    kinds = own_exceptions()
    assert len(kinds) >= 4, kinds
    for kind in kinds:
        known = inspect.signature(kind.__init__).parameters
        words = {"why": "w", "fix": ["f"], "code": ExitCode.DATA, "process": "1 of the 2 processes"}
        error = kind("text", **{name: value for name, value in words.items() if name in known})
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(other) is kind
            assert str(other) == str(error)
            assert vars(other) == vars(error)
            if isinstance(error, UserError):
                assert other.render() == error.render()
