"""Writes docs/reliability.md: each promise, the fault, and the results here and in the plain script."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from scripts.faults.registry import Row, all_rows
from scripts.faults.running import FAILS, HOLDS, MEANINGLESS, SKIPPED, Outcome, Result

HEADINGS = {
    "kills": "Killed at any moment",
    "files": "Files that are damaged, left over, or cannot be written",
    "signals": "Told to end",
    "processes": "Several processes",
    "numbers": "NaN, infinity, and too little memory",
    "images": "Images and folders",
    "sweeps": "Sweeps",
    "security": "Files and words from somebody else",
}
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "ray", "pillow")
LONGEST = 110  # characters of a program's message

PAGE = """# What holds when things break

{here} of {count} promises hold in this project. The same faults were done to an ordinary Lightning script
([plain_lightning.py](../scripts/baselines/plain_lightning.py): Trainer, `ModelCheckpoint(save_last=True)`, `ImageFolder`,
`ckpt_path="last"`): of the {meaningful} that have a meaning for it, {plain} hold there.

Made by the script on {day} with {versions}, on {machine}.

## Try it yourself

```
python scripts/fault_matrix.py                     # all rows, about 15 minutes with --jobs 2; writes this page
python scripts/fault_matrix.py --rows 1-11,16      # some of them
python scripts/fault_matrix.py --quick --jobs 2    # about 3 minutes: one or two of each kind of fault, which CI runs too
python scripts/fault_matrix.py --list
```

It needs `pip install -e ".[dev]"` and exits with 1 if a row fails here. Rows that need a small disk mount one, which takes
root; without root they are skipped, and the page says so.

## How the faults are made

Each row runs the real command in its own process, on three classes of 18 images (most are forked from a process that has
imported torch, which saves seconds and changes nothing: `tests/warm.py`). The fault is real as well: a signal from outside
or at the n-th call of a function, a file cut in half, a full disk, a system limit. Out-of-memory is raised as torch raises
it. The programs have no hooks for tests: [scripts/faults/](../scripts/faults/) wraps a function of a library or of the
system, the same one in both programs.

**Exact** means that every tensor and number of `last.ckpt` (weights, optimizer, schedule) and of `best.ckpt`,
`model.safetensors`, `split.csv` and `confusion.csv` has the same SHA-256 as in an undisturbed run, and that `metrics.csv` has
the same numbers. For the plain script only `last.ckpt` is compared.

**Without its guard** means the row again with the mechanism that keeps the promise switched off. That must fail, or the row
would prove nothing. A row that fails for the plain script is such a control too.

## The rows
{tables}
## What is not shown

A power failure: the system's cache survives a kill, so fsync is not tested. GPUs and NCCL. Real clusters: scripts with the
names of SLURM's commands stand in for them.
"""


def write_page(path: Path, outcomes: Sequence[Outcome], kills: int) -> None:
    by_number = {outcome.number: outcome for outcome in outcomes}
    rows = [row for row in all_rows() if row.number in by_number]
    tables = "".join(_table(topic, rows, by_number) for topic in HEADINGS)
    meaningful = [outcome.plain.state for outcome in outcomes if outcome.plain.state in (HOLDS, FAILS)]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    page = PAGE.format(
        here=sum(outcome.here.state == HOLDS for outcome in outcomes),
        count=len(outcomes),
        meaningful=len(meaningful),
        plain=meaningful.count(HOLDS),
        day=f"{date.today():%d %B %Y}",
        versions=f"Python {platform.python_version()}, {versions}",
        machine=f"{platform.system()} with {os.cpu_count()} cores and no GPU; row 4 with {kills} kills",
        tables=tables,
    )
    path.write_text(page, encoding="utf-8")


def _table(topic: str, rows: Sequence[Row], outcomes: dict[int, Outcome]) -> str:
    lines = [_line(row, outcomes[row.number]) for row in rows if row.topic == topic]
    if not lines:
        return ""
    header = "| # | promise | what is done | here | seconds | plain Lightning |\n|---|---|---|---|---|---|"
    return "\n".join([f"\n### {HEADINGS[topic]}\n", header, *lines, ""])


def _line(row: Row, outcome: Outcome) -> str:
    here = _cell(outcome.here)
    if outcome.control.state != MEANINGLESS:
        fails = outcome.control.state == FAILS
        here += f"; without {row.guard.name}: {'fails' if fails else 'HOLDS, so that the row shows nothing'}"
    plain = "holds" if outcome.plain.state == HOLDS else _cell(outcome.plain)
    cells = [f"{row.number} {row.name}", row.promise, row.injection, here, f"{outcome.here.seconds:.0f}", plain]
    return "| " + " | ".join(cells) + " |"


def _cell(result: Result) -> str:
    if result.state == MEANINGLESS:
        return "-"
    if result.state == SKIPPED:
        return f"not tried: {_readable(result.said)}" if result.said else "not tried"
    return f"**{result.state}**: {_readable(result.said)}"


def _readable(said: str) -> str:
    """One short line without this machine's paths or Markdown's special characters."""
    said = re.sub(r"(?:/[\w.+-]+){2,}/?", lambda match: Path(match[0]).name, said)
    said = re.sub(r"[|`*<>\[\]]", " ", said)
    said = " ".join(said.split())
    return said if len(said) <= LONGEST else said[:LONGEST].rsplit(" ", 1)[0] + " ..."
