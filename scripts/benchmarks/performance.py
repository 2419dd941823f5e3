"""Runs the benchmarks of speed one after the other and writes what they print into docs/performance.md.

    python scripts/benchmarks/performance.py                # all of them: an hour, with nothing beside it
    python scripts/benchmarks/performance.py start loader   # some of them; the rest of the page stays

Each is a section of its own with the day, so that some can be repeated. The page above its first section is written by hand.
"""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/performance.md"
BENCHMARKS = {  # what a section is called, and the words of its command
    "start": "scripts/benchmarks/start.py --rounds 3",
    "loader": "scripts/benchmarks/loader.py --rounds 3",
    "fit": "scripts/benchmarks/fit.py",
    "feature_bank": "scripts/benchmarks/feature_bank.py --rounds 1",
    "head_sweep": "scripts/benchmarks/head_sweep.py --trials 20",  # room: sweeps
    "precision": "scripts/benchmarks/precision.py",
    "channels_last": "scripts/benchmarks/channels_last.py",
    "checkpoint_writing": "scripts/benchmarks/checkpoint_writing.py 0",
    "ddp_step": "scripts/benchmarks/ddp_step.py",
    "peers": "scripts/benchmarks/peers",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHMARKS)}")
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    failed = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name} ...", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, *shlex.split(BENCHMARKS[name])], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        print(f"{done.stdout}({time.monotonic() - began:.0f} s)\n", flush=True)
        if done.returncode:
            failed.append(name)
        else:
            PAGE.write_text(with_section(PAGE.read_text(), name, section(name, done.stdout)))
    print(f"{PAGE.relative_to(ROOT)} is written." + (f" Failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def section(name: str, printed: str) -> str:
    """A heading, the command, the machine and what the benchmark printed."""
    text = printed.strip("\n").rstrip()  # a table's first line begins with blanks
    return f"### {name}\n\n`python {BENCHMARKS[name]}`, {date.today()}, {machine()}\n\n```\n{text}\n```\n"


def with_section(page: str, name: str, text: str) -> str:
    """The page with this section in the place of an older one, or at its end."""
    old = re.compile(rf"^### {re.escape(name)}\n.*?(?=^### |\Z)", re.DOTALL | re.MULTILINE)
    if old.search(page):
        return old.sub(lambda _: f"{text}\n", page).rstrip("\n") + "\n"
    return page.rstrip("\n") + f"\n\n{text}"


def machine() -> str:
    """One line: processor, cores, Python and the libraries that decide about speed."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found[1] if found else cpu
    from src.engine.runs.cores import cpu_cores

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning"))
    return f"{cpu_cores()} cores of {cpu}, Python {platform.python_version()}, {libraries}"


if __name__ == "__main__":
    sys.exit(main())
