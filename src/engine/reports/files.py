"""The files of a run's folder as a report reads them; each may be missing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from src.engine.runs.files import NAMES, original

Row = dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows; none without the file."""
    if not path.exists():
        return [], []
    with path.open(newline="", **NAMES) as file:
        header, *rows = ([original(cell) for cell in row] for row in csv.reader(file))
    return header, rows


def read_rows(path: Path) -> list[Row]:
    header, rows = read_table(path)
    return [dict(zip(header, row, strict=False)) for row in rows]


def read_columns(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers, an empty cell as nan; {} without the file."""
    header, rows = read_table(path)
    return {name: [number(row[place]) for row in rows] for place, name in enumerate(header)}


def number(cell: str) -> float:
    return float(cell or "nan")
