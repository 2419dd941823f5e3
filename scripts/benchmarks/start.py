"""How long commands take to start, beside the imports that they cannot do without.

    python scripts/benchmarks/start.py            # medians of 5 rounds, in each of which every command runs once
    python scripts/benchmarks/start.py --rounds 9

Seconds of the clock, and of the CPU (user and system), which other programs disturb less. Of debug=true counts the time until
its first training step has ended.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["-m", "src.train"]
# Ends the process with its first step.
DEBUG = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "src.engine.runs.progress":  # imported with the callbacks, when Lightning is there
            sys.meta_path.remove(self)
            import src.engine.runs.progress as progress
            progress.Throughput.on_train_batch_end = lambda *args: os._exit(0)
sys.meta_path.insert(0, Finder())
sys.argv = ["src.train", "debug=true", "logger=csv", "baseline=none"]
runpy.run_module("src.train", run_name="__main__", alter_sys=True)
"""
COMMANDS = {
    "import hydra": ["-c", "import hydra"],
    "--help": [*TRAIN, "--help"],
    "a mistyped word": [*TRAIN, "data.batchsize=4"],
    "import torch, torchvision, lightning": ["-c", "import torch, torchvision, lightning"],
    "debug=true, until its first step": ["-c", DEBUG],
}


def measure(words: list[str], folder: str) -> tuple[float, float]:
    """Seconds of the clock and of the CPU."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    taken, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 64), done.stderr
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    readings = defaultdict(list)
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            with tempfile.TemporaryDirectory() as folder:
                readings[name].append(measure(words, folder))
    print(f"{'':38}{'clock':>8}{'CPU':>8}")
    for name, pairs in readings.items():
        clock, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:38}{clock:8.2f}{cpu:8.2f}")


if __name__ == "__main__":
    main()
