"""Cells that a spreadsheet would compute are text in our CSV files, and come back as what they were."""

from __future__ import annotations

import csv

import pytest

from src.engine.images.splits import SplitSettings, choose_split
from src.engine.images.table import read_csv
from src.engine.runs.files import harmless, original, write_csv
from src.engine.runs.tables import write_confusion

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-1-1", "@SUM(A1)", "\t=1", "\r=1", "=HYPERLINK(1).png", "'=1", "''-x", "-"]
OTHERS = ["", "a=b", "'a'", "cat", -1, -1.5, "-1", "-1.5e-05", "+3", "-inf", None, "'"]


@pytest.mark.parametrize("cell", FORMULAS)
def test_a_formula_is_text_for_a_spreadsheet_and_comes_back(cell):
    assert harmless(cell) == f"'{cell}"
    assert original(harmless(cell)) == cell


@pytest.mark.parametrize("cell", OTHERS)
def test_numbers_and_other_text_stay(cell):
    assert harmless(cell) == cell
    if isinstance(cell, str):
        assert original(cell) == cell


def test_a_split_with_such_names_is_read_back(tmp_path):
    names = [name for name in FORMULAS if name.isprintable()] + ["plain.jpg"]
    write_csv(tmp_path / "split.csv", ["path", "label", "split"], [[name, name, "train"] for name in names])
    rows = [row for _, row in read_csv(tmp_path / "split.csv", ("path", "split"), ours=True)]
    assert [row["path"] for row in rows] == [row["label"] for row in rows] == names
    settings = SplitSettings(0, 0.15, 0.15, file=tmp_path / "split.csv")
    assert choose_split(names, names, None, settings)["train"] == list(range(len(names)))


def test_a_table_of_confusions_holds_no_formula(tmp_path):
    write_confusion(tmp_path / "confusion.csv", ["=1+1", "b"], [(0, 0, 1), (0, 1, 2), (1, 0, 3), (1, 1, 4)])
    with (tmp_path / "confusion.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["true \\ predicted", "'=1+1", "b"], ["'=1+1", "1", "2"], ["b", "3", "4"]]
