"""Times the README's first command and --help, and prints the accuracies.

    python scripts/benchmarks/default_run.py [times]            default: 3

Each is a new process with all cores, timed from command to prompt; run nothing else meanwhile.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(*words: str) -> float:
    """Seconds of `python -m src.train words...`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "src.train", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    helps = [timed("--help") for _ in range(max(5, times))]
    print(f"--help       {statistics.median(helps):.2f} s  (median of {len(helps)})")
    for seed in range(times):
        with tempfile.TemporaryDirectory() as folder:
            seconds = timed(f"seed={seed}", "name=run", f"runs_dir={folder}")
            result = json.loads((Path(folder) / "run" / "result.json").read_text())
        metrics = result["metrics"]
        print(
            f"seed {seed}       {seconds:.1f} s from command to prompt, {result['wall_seconds']:.1f} s of them the run; "
            f"val/acc {metrics['val/acc']:.4f}  test/acc {metrics['test/acc']:.4f}  best epoch {result['best_epoch']}"
        )


if __name__ == "__main__":
    main()
