"""pyright over src/: no file may have more errors than scripts/type_errors.json allows, and the numbers only fall.

    python scripts/type_check.py            # exit code 1 and the errors of each file that has more than it may
    python scripts/type_check.py --moved    # after code was moved: counts anew by file, if the sum did not rise

A file that is not in the list may have none, and no file outside of src/engine/ is in it. Where a file has fewer than
before, its number is lowered.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = Path(__file__).with_name("type_errors.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moved", action="store_true")
    moved = parser.parse_args().moved
    done = subprocess.run([sys.executable, "-m", "pyright", "--outputjson"], cwd=ROOT, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        print(done.stdout + done.stderr)
        return 1
    errors = [entry for entry in report["generalDiagnostics"] if entry["severity"] == "error"]
    counts = Counter(Path(entry["file"]).relative_to(ROOT).as_posix() for entry in errors)
    allowed: dict[str, int] = json.loads(ALLOWED.read_text())
    files = report["summary"]["filesAnalyzed"]
    print(f"pyright: {len(errors)} errors in {files} files, {sum(allowed.values())} allowed")
    worse = {file for file, count in counts.items() if count > allowed.get(file, 0)}
    if moved and len(errors) <= sum(allowed.values()):
        allowed = {file: count for file, count in counts.items() if file.startswith("src/engine/")}
        worse = counts.keys() - allowed.keys()
    for entry in errors:
        file = Path(entry["file"]).relative_to(ROOT).as_posix()
        if file in worse:
            print(f"{file}:{entry['range']['start']['line'] + 1} {entry['message']} ({entry.get('rule', '')})")
    for file in sorted(worse):
        print(f"{file} has {counts[file]} errors, {allowed.get(file, 0)} allowed")
    if worse:
        print("mend them; where code has only moved to another file: python scripts/type_check.py --moved")
        return 1
    lowered = {file: min(number, counts[file]) for file, number in sorted(allowed.items()) if counts[file]}
    ALLOWED.write_text(json.dumps(lowered, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
