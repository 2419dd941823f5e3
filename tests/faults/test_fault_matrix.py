"""The quick rows of docs/reliability.md, and that the page is what scripts/fault_matrix.py says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.faults.project import Project, Unguarded
from scripts.faults.registry import Impossible, all_rows
from scripts.faults.running import FAILS, break_program
from tests.warm import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, /proc and small file systems of Linux")

ROWS = {row.number: row for row in all_rows()}
PAGE = ROOT / "docs" / "reliability.md"
LINE = re.compile(
    r"\| (?P<number>\d+) (?P<name>\w+) \| (?P<promise>.+?) \| (?P<injection>.+?) \| (?P<here>.+?) \| \d+ \|"
)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes of a test run keep the results of the runs to which nothing happens."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed"


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.quick], ids=lambda row: f"{row.number}-{row.name}")
def test_a_promise_holds(row, tmp_path, undisturbed):
    project = Project(tmp_path / "here", undisturbed)
    try:
        row.test(project)
    except Impossible as error:
        pytest.skip(str(error))
    finally:
        project.end_processes()


@pytest.mark.parametrize("number", [9, 28])
def test_a_row_fails_without_its_guard(number, undisturbed):
    """The other guards are tried by the script, with every page that it writes."""
    assert break_program(ROWS[number], Unguarded, undisturbed.parent).state == FAILS


@pytest.mark.needs("sweeps")
def test_the_page_has_every_row_as_it_is_now():
    """With other promises or faults it would have to be made again."""
    lines = {int(found["number"]): found for found in LINE.finditer(PAGE.read_text(encoding="utf-8"))}
    assert sorted(lines) == sorted(ROWS) == list(range(1, 57))
    for number, row in ROWS.items():
        assert lines[number].group("name", "promise", "injection") == (row.name, row.promise, row.injection)
        assert lines[number]["here"].startswith(("**holds**", "**fails**", "not tried"))


def test_the_script_runs_the_rows_that_it_is_told(tmp_path):
    """Row 56 reads a file; a page of one row says so."""
    page = tmp_path / "page.md"
    script = [sys.executable, "scripts/fault_matrix.py", "--rows", "56", "--out", str(page)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 rows hold" in done.stdout
    assert LINE.search(page.read_text())["name"] == "no_compromised_pin"
