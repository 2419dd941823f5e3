"""The quick tests with the oldest, the newest and the coming versions of the libraries, each in an environment of its own.

    python scripts/test_matrix.py oldest newest pre-releases       # or some of them; writes docs/versions.md
    python scripts/test_matrix.py oldest --python python3.11 --tests tests/models

oldest: the lowest version of each library that pyproject.toml allows. newest: what pip chooses. pre-releases: pyproject.toml's
upper bounds are ignored and release candidates are taken. An environment needs 6 GB below --folder and is removed at the end.
Exit code 1 if a test fails.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
CELLS = ("oldest", "newest", "pre-releases")
SHOWN = ("torch", "torchvision", "lightning", "hydra-core", "omegaconf", "ray", "optuna", "numpy", "pillow", "timm")
OWN = "image-transfer-learning"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", choices=CELLS)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    parser.add_argument(
        "--folder", type=Path, help="where the environments are made; default: the system's for temporary files"
    )
    parser.add_argument("--tests", nargs="*", default=[], help="what pytest is told; default: nothing, the quick tier")
    arguments = parser.parse_args()
    failed = False
    for cell in arguments.cells:
        folder = Path(tempfile.mkdtemp(prefix=f"matrix-{cell}-", dir=arguments.folder))
        try:
            row = try_cell(cell, folder, arguments.python, arguments.tests)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(row, indent=1))
        write_row(row)
        failed = failed or "passed" not in row["tests"] or "failed" in row["tests"]
    return int(failed)


def try_cell(cell: str, folder: Path, python: str, tests: list[str]) -> dict[str, str]:
    """The row of the table: versions, and the last line of pytest."""
    began = time.monotonic()
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    row = {"cell": cell, "date": str(date.today())}
    installed = subprocess.run([*pip, *(["--pre"] if cell == "pre-releases" else []), *requirements(cell)])
    if installed.returncode != 0:
        return row | {"tests": "pip found no such set of versions"}
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    versions = subprocess.run([inside, "-c", VERSIONS, *SHOWN], check=True, capture_output=True, text=True)
    row |= json.loads(versions.stdout)
    done = subprocess.run(
        [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout[-6000:])
    minutes = (time.monotonic() - began) / 60
    last = done.stdout.strip().splitlines()[-1].strip("= ")
    return row | {
        "tests": f"{last}; {minutes:.0f} min with the installation" + (f" ({' '.join(tests)})" if tests else "")
    }


VERSIONS = """
import importlib.metadata, json, platform, sys
print(json.dumps({"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


def requirements(cell: str) -> list[str]:
    """What pip is told to install: pyproject.toml's libraries with the bounds that the cell has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = list(project["dependencies"])
    for requirement in extras["dev"]:
        if requirement.startswith(OWN):
            wanted += [line for extra in re.findall(r"\w+", requirement.partition("[")[2]) for line in extras[extra]]
        else:
            wanted.append(requirement)
    bound = {"oldest": at_lowest, "newest": str, "pre-releases": without_upper_bound}[cell]
    return [bound(requirement) for requirement in wanted]


def at_lowest(requirement: str) -> str:
    """torch>=2.10,<2.16 -> torch==2.10.*; numpy>=2,<3 -> numpy==2.0.*"""
    name, lower, bound = requirement.partition(">=")
    version = bound.partition(",")[0]
    if not lower:
        return requirement
    return f"{name}=={version if '.' in version else version + '.0'}.*"


def without_upper_bound(requirement: str) -> str:
    return requirement.partition(",<")[0]


def write_row(row: dict[str, str]) -> None:
    """Puts the row into the table of docs/versions.md, in the place of the cell's earlier one."""
    columns = ["cell", "date", "Python", *SHOWN, "tests"]
    text = PAGE.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.split("|")[1].strip() in CELLS]
    rows = [line for line in rows if line.split("|")[1].strip() != row["cell"]]
    rows.append("| " + " | ".join(row.get(column, "") for column in columns) + " |")
    rows.sort(key=lambda line: CELLS.index(line.split("|")[1].strip()))
    head = text[: text.index("| cell |")] if "| cell |" in text else text + "\n"
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *rows]
    PAGE.write_text(head + "\n".join(table) + "\n")


if __name__ == "__main__":
    sys.exit(main())
