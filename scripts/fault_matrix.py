"""Injects 56 faults into this project and into a plain Lightning script, and reports which promises hold.

    python scripts/fault_matrix.py                      all rows, about 15 minutes: writes docs/reliability.md
    python scripts/fault_matrix.py --rows 1-11,16       some rows: prints their results, and writes nothing
    python scripts/fault_matrix.py --quick --jobs 2     the rows that CI runs, about 3 minutes
    python scripts/fault_matrix.py --list               the promises

The signals, damaged files and full disks are real. The rows are short functions in scripts/faults/. Exit code 1 if a row fails
for this project; the plain script's results are only shown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    from scripts.faults.registry import Row
    from scripts.faults.running import Outcome


def main() -> int:
    options = parse()

    from scripts.faults.page import write_page  # with torch, which takes seconds
    from scripts.faults.registry import all_rows

    rows = chosen(all_rows(), options.rows, options.quick)
    if options.list:
        for row in rows:
            print(f"{row.number:>2} {row.name:<22} {row.injection}: {row.promise}")
        return 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        outcomes = run_all(rows, options, Path(folder))
    failed = [outcome for outcome in outcomes if outcome.failed]
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} rows hold")
    for outcome in failed:
        print(f"  row {outcome.number} {outcome.name}: {outcome.here.said}")
    if options.results is not None:
        outcomes = kept(options.results, [])
    if options.out is not None or len(outcomes) == len(all_rows()):
        write_page(options.out or ROOT / "docs" / "reliability.md", outcomes, options.kills)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="numbers and ranges of them, such as 1,2,8 or 1-11")
    parser.add_argument("--quick", action="store_true", help="only the rows that CI runs")
    parser.add_argument("--no-baseline", action="store_true", help="without the plain Lightning script")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, at most one per core (default: 1)")
    parser.add_argument("--kills", type=int, default=20, help="of row 4, at random instants (default: 20)")
    parser.add_argument(
        "--out", type=Path, help="the page to write; without it docs/reliability.md, if all rows are run"
    )
    parser.add_argument("--results", type=Path, help="JSON file that collects outcomes of several calls for the page")
    parser.add_argument("--list", action="store_true", help="print the rows and do nothing")
    return parser.parse_args()


def chosen(rows: Sequence[Row], numbers: str | None, quick: bool) -> list[Row]:
    wanted = {row.number for row in rows}
    if numbers is not None:
        ends = [part.partition("-") for part in numbers.split(",")]
        asked = {number for first, _, last in ends for number in range(int(first), int(last or first) + 1)}
        if missing := asked - wanted:
            sys.exit(f"there is no row {', '.join(map(str, sorted(missing)))}; --list shows them")
        wanted = asked
    return [row for row in rows if row.number in wanted and (row.quick or not quick)]


def run_all(rows: Sequence[Row], options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """Outcomes in the order of the rows; each is printed at once."""
    from scripts.faults.running import run_row

    context = multiprocessing.get_context("spawn")
    outcomes = []
    with ProcessPoolExecutor(options.jobs, context, initializer=set_kills, initargs=(options.kills,)) as pool:
        jobs = [pool.submit(run_row, row.number, folder, not options.no_baseline, not options.quick) for row in rows]
        for job in as_completed(jobs):
            outcomes.append(outcome := job.result())
            print(outcome.line(), flush=True)
            if options.results is not None:
                kept(options.results, [outcome])
    return sorted(outcomes, key=lambda outcome: outcome.number)


def kept(file: Path, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Merges the outcomes into the file; returns all that are in it."""
    from scripts.faults.running import Outcome

    known = [Outcome.of(fields) for fields in json.loads(file.read_text())] if file.exists() else []
    both = {outcome.number: outcome for outcome in [*known, *outcomes]}
    file.write_text(json.dumps([asdict(outcome) for outcome in both.values()], indent=1))
    return [both[number] for number in sorted(both)]


def set_kills(count: int) -> None:
    from scripts.faults import kills

    kills.KILLS = count


if __name__ == "__main__":
    sys.exit(main())
