"""Runs the quick tests with the oldest, the newest and the coming versions of the libraries, and writes docs/versions.md.

    pip install uv
    python scripts/test_matrix.py oldest newest pre-releases
    python scripts/test_matrix.py newest --python 3.14
    python scripts/test_matrix.py oldest --pytest "-n 1 tests/house tests/engine/commands"

oldest        the lowest version of each library that pyproject.toml allows
newest        the highest
pre-releases  release candidates and beta versions too, without pyproject.toml's upper bounds

Each cell is installed by uv in a new virtual environment, which takes 6 GB and is removed at the end. Its result replaces the
row of the same cell and Python in scripts/versions.json, from which the table of docs/versions.md is made, so cells can be
run one by one. Exit code 1 if a test fails or a cell cannot be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
CELLS = {
    "oldest": ["--resolution", "lowest-direct"],
    "newest": [],
    "pre-releases": ["--prerelease", "allow"],
}
SHOWN = ("torch", "torchvision", "lightning", "hydra-core", "omegaconf", "ray", "optuna", "numpy", "pillow", "timm")
VERSIONS = """
import importlib.metadata, json, platform, sys
versions = {name: importlib.metadata.version(name) for name in sys.argv[1:]}
print(json.dumps({"python": platform.python_version(), "versions": versions}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", choices=CELLS, metavar="CELL", help=", ".join(CELLS))
    parser.add_argument(
        "--python", default=sys.executable, help="version or path; default: the one that runs this script"
    )
    parser.add_argument(
        "--folder", type=Path, help="where environments are made; default: the system's temporary folder"
    )
    parser.add_argument(
        "--pytest", default="", metavar="WORDS", help="what pytest is told; default: nothing, the quick tier"
    )
    arguments = parser.parse_args()
    failed = False
    for cell in arguments.cells:
        with tempfile.TemporaryDirectory(prefix=f"matrix-{cell}-", dir=arguments.folder) as folder:
            result = try_cell(cell, Path(folder), arguments.python, arguments.pytest)
        write(result)
        print(f"== {cell}: {outcome(result)}", *result["failed"], sep="\n   ", flush=True)
        failed = failed or bool(result["failed"])
    return int(failed)


def try_cell(cell: str, folder: Path, python: str, words: str) -> dict[str, Any]:
    """Installs the cell and runs its tests. Returns its row of scripts/versions.json."""
    began = time.monotonic()
    result: dict[str, Any] = {
        "cell": cell,
        "date": str(date.today()),
        "python": python,
        "versions": {},
        "pytest": words,
    }
    inside = folder / "venv" / "bin" / "python"
    print(f"== {cell}: installing", flush=True)
    overrides = folder / "overrides.txt"
    overrides.write_text("\n".join(without_upper_bounds()) if cell == "pre-releases" else "")
    try:
        uv("venv", "--quiet", "--python", python, folder / "venv")
        uv("pip", "install", "--quiet", "--python", inside, "--overrides", overrides, *CELLS[cell], "-e", ".[dev]")
    except subprocess.CalledProcessError:
        return result | {"passed": 0, "skipped": 0, "failed": ["the installation"], "minutes": 0}
    result |= json.loads(subprocess.check_output([inside, "-c", VERSIONS, *SHOWN], text=True))
    print(f"== {cell}: testing with Python {result['python']}, {result['versions']}", flush=True)
    report = folder / "report.xml"
    pytest = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *shlex.split(words)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{inside.parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(pytest, cwd=ROOT, env=environment)
    result |= counted(report) if report.exists() else {"passed": 0, "skipped": 0, "failed": []}
    if done.returncode > 1 or done.returncode < 0:  # interrupted, or no test was found
        result["failed"] = [*result["failed"], f"pytest ended with {done.returncode}"]
    return result | {"minutes": round((time.monotonic() - began) / 60)}


def uv(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "uv", *words], cwd=ROOT, check=True)


def without_upper_bounds() -> list[str]:
    """torch>=2.10,<2.16 -> torch>=2.10, of all libraries in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [re.sub(r",<.*", "", line) for line in lines if not line.startswith(project["name"])]


def counted(report: Path) -> dict[str, Any]:
    """How many tests passed and were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {f"{case.get('classname')}::{case.get('name')}" for case in cases if {"failure", "error"} & tags(case)}
    skipped = sum("skipped" in tags(case) for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": sorted(failed)}


def tags(case: ElementTree.Element) -> set[str]:
    return {child.tag for child in case}


def write(result: dict[str, Any]) -> None:
    """Puts the result into scripts/versions.json, in the place of an earlier one, and the table into docs/versions.md."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    results = [*(other for other in results if key(other) != key(result)), result]
    results.sort(key=lambda row: (list(CELLS).index(row["cell"]), key(row)))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    head = PAGE.read_text().partition("\n| cell |")[0].rstrip()
    rows = [["cell", "date", "Python", *SHOWN, "tests"], ["---"] * (len(SHOWN) + 4)]
    for row in results:
        versions = [row["versions"].get(name, "") for name in SHOWN]
        rows.append([row["cell"], row["date"], row["python"], *versions, outcome(row)])
    table = [f"| {' | '.join(row)} |" for row in rows]
    failed = [f"- {row['cell']}, Python {row['python']}: `{name}`" for row in results for name in row["failed"]]
    PAGE.write_text("\n".join([head, "", *table, *(["", *failed] if failed else [])]) + "\n")


def key(row: dict[str, Any]) -> tuple[str, str]:
    """The cell and 3.11: the row that a new result replaces."""
    return row["cell"], ".".join(row["python"].split(".")[:2])


def outcome(row: dict[str, Any]) -> str:
    failed = f"{len(row['failed'])} failed, " if row["failed"] else ""
    tests = f"`{row['pytest']}`" if row["pytest"] else "the quick tests"
    return f"{failed}{row['passed']} passed, {row['skipped']} skipped of {tests} in {row['minutes']} min"


if __name__ == "__main__":
    sys.exit(main())
