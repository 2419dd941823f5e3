"""The one screen of an error, whatever went wrong."""

from __future__ import annotations

import pytest

from src.errors import ExitCode, UserError, run_and_report


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


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130)])
def test_ctrl_c(error, code, capsys):
    assert run_and_report(raise_(error)) == code
    assert "to continue" in capsys.readouterr().err
