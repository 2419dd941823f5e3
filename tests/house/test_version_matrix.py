"""The page of scripts/test_matrix.py: a row per cell and Python, and the tests that failed by name."""

from __future__ import annotations

import pytest

from scripts import test_matrix


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(test_matrix, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(test_matrix, "PAGE", tmp_path / "versions.md")
    test_matrix.PAGE.write_text("# Versions\n\nWhat it is.\n")


def row(cell: str, python: str, **changes) -> dict:
    return {
        "cell": cell, "date": "2026-11-29", "python": python, "versions": {"torch": "2.10.0"}, "pytest": "",
        "passed": 9, "skipped": 1, "failed": [], "minutes": 5,
    } | changes  # fmt: skip


def test_a_result_replaces_the_one_of_its_cell_and_python():
    for result in row("newest", "3.14.8"), row("oldest", "3.11.2", failed=["tests.a::b"]), row("newest", "3.13.0"):
        test_matrix.write(result)
    test_matrix.write(row("newest", "3.14.9", pytest="tests/house"))
    head, table = test_matrix.PAGE.read_text().split("\n\n| cell |")
    assert head == "# Versions\n\nWhat it is."
    oldest, first, second, blank, failed = table.splitlines()[2:]
    assert oldest.startswith("| oldest | 2026-11-29 | 3.11.2 | 2.10.0 |")
    assert oldest.endswith("| 1 failed, 9 passed, 1 skipped of the quick tests in 5 min |")
    assert first.split(" | ")[2] == "3.13.0"
    assert second.split(" | ")[2] == "3.14.9"
    assert "9 passed, 1 skipped of `tests/house`" in second
    assert (blank, failed) == ("", "- oldest, Python 3.11.2: `tests.a::b`")


def test_failed_tests_have_names(tmp_path):
    case = '<testcase classname="tests.test_a" name="{}">{}</testcase>'
    inside = [
        case.format("a", ""),
        case.format("b", "<failure/>"),
        case.format("c", "<skipped/>"),
        case.format("d", "<error/>"),
    ]
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{''.join(inside)}</testsuite></testsuites>")
    counted = test_matrix.counted(tmp_path / "report.xml")
    assert counted == {"passed": 1, "skipped": 1, "failed": ["tests.test_a::b", "tests.test_a::d"]}


def test_upper_bounds_go_and_the_rest_stays():
    lines = test_matrix.without_upper_bounds()
    assert not any("<" in line for line in lines)
    assert "torch>=2.10" in lines
    assert "efficientnet-lite-pytorch==0.1.0" in lines
