"""What data.class_weights does for the rare classes of a folder: the table of docs/uneven.md.

    python scripts/benchmarks/class_weights.py photos/ [runs_dir] [monitor]

Trains each form with three seeds by the real command: 64 pixels, 10 epochs, best epoch by val/balanced_acc or `monitor`.
Finished runs in runs_dir (default: runs/uneven) are not repeated.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

FORMS, SEEDS = ("none", "balanced", "inverse"), (0, 1, 2)
METRICS = {"test/balanced_acc": "balanced accuracy", "test/acc": "accuracy"}


def train(folder: str, runs_dir: str, monitor: str, form: str, seed: int) -> dict[str, float]:
    """The metrics of a run."""
    name = f"{form}-{monitor.rpartition('/')[2]}-{seed}"
    words = [
        *("data=image_folder", f"data.root={folder}", "data.image_size=64", "trainer.max_epochs=10"),
        *(f"data.class_weights={form}", f"checkpoint.monitor={monitor}", f"seed={seed}", f"name={name}"),
        *(f"runs_dir={runs_dir}", "logger=csv"),
    ]
    subprocess.run([sys.executable, "-m", "src.train", *words], check=True, stdout=subprocess.DEVNULL)
    return json.loads((Path(runs_dir) / name / "result.json").read_text())["metrics"]


def main() -> None:
    folder, runs_dir, monitor = (sys.argv[1:] + [None] * 3)[:3]
    runs_dir, monitor = runs_dir or "runs/uneven", monitor or "val/balanced_acc"
    results = {form: [train(folder, runs_dir, monitor, form, seed) for seed in SEEDS] for form in FORMS}

    with next(Path(runs_dir).glob("*/split.csv")).open(encoding="utf-8", newline="") as file:
        counts = Counter(row["label"] for row in csv.DictReader(file) if row["split"] == "train")
    print(
        f"{len(counts)} classes, {sum(counts.values())} training images, {min(counts.values())} to {max(counts.values())}\n"
    )
    print(f"| data.class_weights | test | seeds {', '.join(map(str, SEEDS))} | mean | spread |\n|---|---|---|---|---|")
    for form, runs in results.items():
        for metric, called in METRICS.items():
            values = [run[metric] for run in runs]
            each = " ".join(f"{value:.3f}" for value in values)
            print(f"| {form} | {called} | {each} | {statistics.mean(values):.3f} | {statistics.stdev(values):.3f} |")


if __name__ == "__main__":
    main()
