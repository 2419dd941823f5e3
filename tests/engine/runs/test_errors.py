"""The one screen of an error, whatever went wrong."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from src.engine.runs.errors import ExitCode, UserError, run_and_report


def raise_(error: BaseException):
    def work():
        raise error

    return work


def test_a_user_error_fits_on_the_screen_however_long_its_parts_are(tmp_path, capsys):
    error = UserError(
        "found it", where="x " * 300, why="\n".join(f"line {i}" for i in range(40)), fix=["do"] * 30, code=ExitCode.DATA
    )
    assert run_and_report(raise_(error), lambda: tmp_path) == 65
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 15
    assert lines[0] == "ERROR   found it  (exit code 65)"
    assert lines[-1].endswith("error.log")
    assert "UserError: found it" in (tmp_path / "error.log").read_text()


def test_a_command_to_paste_stays_on_one_line():
    fix = "python -m src.train " + " ".join(f"data.key{i}=value" for i in range(30))
    assert f"fix     {fix}" in UserError("x", fix=fix).render().splitlines()


def test_a_defect_says_so_and_keeps_the_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FULL_TRACE", raising=False)
    assert run_and_report(raise_(KeyError("gone")), lambda: tmp_path) == 70
    shown = capsys.readouterr().err
    assert "unexpected KeyError: 'gone'" in shown
    assert "test_errors.py" in shown
    assert len(shown.splitlines()) <= 15
    assert "Traceback" in (tmp_path / "error.log").read_text()
    monkeypatch.setenv("FULL_TRACE", "1")
    run_and_report(raise_(KeyError("gone")), lambda: tmp_path)
    assert "Traceback" in capsys.readouterr().err


def test_without_a_run_the_traceback_goes_to_a_file_of_its_own(capsys):
    from pathlib import Path

    assert run_and_report(raise_(UserError("x")), lambda: None) == 64
    trace = Path(capsys.readouterr().err.splitlines()[-1].split()[-1])
    assert trace.exists()
    trace.unlink()


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EROFS, "once the disk may be written to again"), (errno.ENOSPC, "once there is room")]
)
def test_a_disk_that_takes_no_more_is_told_from_a_full_one(capsys, number, remedy):
    error = OSError(number, os.strerror(number), f"/r/confusion.csv.{os.getpid()}.tmp")
    assert run_and_report(raise_(error)) == 73
    shown = capsys.readouterr().err
    assert "where   /r/confusion.csv\n" in shown  # and not the temporary file, which is gone
    assert remedy in shown


def test_a_missing_permission_is_named_wherever_it_is_met(capsys):
    assert run_and_report(raise_(PermissionError(13, "Permission denied", "/nowhere/a b/c.png"))) == 66
    shown = capsys.readouterr().err
    assert "/nowhere/a b/c.png may not be read or written" in shown
    assert "fix     ls -ld /\n" in shown


def test_a_program_without_a_console_runs(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)  # as with >&-
    assert run_and_report(lambda: print("x")) == 0
    assert sys.stdout.isatty() is False


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130)])
def test_ctrl_c(error, code, capsys):
    assert run_and_report(raise_(error)) == code
    assert "to continue" in capsys.readouterr().err


def test_the_cause_of_a_loader_process_comes_first(capsys, monkeypatch):
    monkeypatch.delenv("FULL_TRACE", raising=False)
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    text += "  File a, line 1, in b\n    c()\n" * 8 + "ValueError: the cause"
    assert run_and_report(raise_(ValueError(text))) == 70
    assert capsys.readouterr().err.splitlines()[0] == "ERROR   unexpected ValueError: ValueError: the cause"


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shm",
        "Caught RuntimeError in DataLoader worker process 1.\nTraceback\nRuntimeError: unable to write to file </torch_9_1>: "
        "No space left on device (28)",
    ],
)
def test_loaders_without_shared_memory(text, capsys, monkeypatch):
    monkeypatch.setenv("TRAIN_COMMAND", "python -m src.train name=x data.num_workers=2")
    assert run_and_report(raise_(RuntimeError(text))) == 69
    shown = capsys.readouterr().err
    assert "python -m src.train name=x data.num_workers=0" in shown
    assert "--shm-size" in shown


def test_names_from_elsewhere_are_no_commands_to_the_terminal(capsys):
    name = "\x1b]0;title\x07\u202egnp\udcdf"
    assert run_and_report(raise_(UserError(f"{name} is bad", where=name, why=name, fix=f"rm {name}"))) == 64
    assert run_and_report(raise_(KeyError(name))) == 70
    shown = capsys.readouterr().err
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


PRINTING = """
import logging, sys
from src.engine.runs.errors import run_and_report
say = print if sys.argv[1] == "print" else logging.getLogger("src.x").info
def work():
    for _ in range(20_000):
        say("B\xfccher \u732b")
sys.exit(run_and_report(work))
"""


@pytest.mark.parametrize("way", ["log", "print"])
@pytest.mark.parametrize(
    ("behind", "code", "said"),
    [("| head -1", 0, ""), ("2>&1 | head -1", 0, ""), ("> /dev/full", 73, "cannot be written")],
)
def test_a_reader_that_has_seen_enough(tmp_path, way, behind, code, said):
    import subprocess
    import sys

    from tests.conftest import ROOT, command_environment

    (tmp_path / "program.py").write_text(PRINTING)
    shell = f"set -o pipefail; {sys.executable} program.py {way} {behind}"
    variables = command_environment() | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60
    )
    if way == "log" and code:
        code, said = 0, ""  # messages are in train.log too; nothing was lost that was asked for
    assert done.returncode == code, done
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == (1 if said else 0), done.stderr
    if "head" in behind:
        assert done.stdout.strip() == "B\\xfccher \\u732b"


def test_a_pipe_that_breaks_elsewhere_is_an_error(capsys):
    def work():
        raise BrokenPipeError(32, "Broken pipe")

    assert run_and_report(work) == ExitCode.BUG
    assert "BrokenPipeError" in capsys.readouterr().err
