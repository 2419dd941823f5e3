"""What makes up for uneven classes: the tables of docs/uneven.md.

    python scripts/benchmarks/class_weights.py                  # digits, two classes of which have 10 training images
    python scripts/benchmarks/class_weights.py photos/          # a folder of yours: 64 pixels, 10 epochs, default recipe

Trains each way with three seeds by the real command; the best epoch is that of --monitor. Finished runs in --runs-dir are not
repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

WAYS = (
    "data.class_weights=none",
    "data.class_weights=balanced",
    "data.sampler=balanced",
    "model.loss=logit_adjusted",
    "model.loss=focal",
    "data.class_weights=inverse",
)
SEEDS = (0, 1, 2)
METRICS = {"test/balanced_acc": "balanced accuracy", "test/acc": "accuracy"}
RARE, IMAGES = ("3", "8"), {"train": (60, 10), "val": (24, 4), "test": (90, 15)}  # of a common class, of a rare one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a folder per class; none: uneven digits")
    parser.add_argument("--runs-dir", default="runs/uneven")
    parser.add_argument("--monitor", default="val/balanced_acc")
    arguments = parser.parse_args()
    results = {}
    for way in WAYS:
        results[way] = [train(arguments, way, seed) for seed in SEEDS]
    with next(Path(arguments.runs_dir).glob("*/split.csv")).open(encoding="utf-8", newline="") as file:
        counts = Counter(row["label"] for row in csv.DictReader(file) if row["split"] == "train")
    sizes = f"{min(counts.values())} to {max(counts.values())}"
    print(f"{len(counts)} classes, {sum(counts.values())} training images, {sizes} in a class\n")
    print(f"| | test | seeds {', '.join(map(str, SEEDS))} | mean | spread |\n|---|---|---|---|---|")
    for way, runs in results.items():
        for metric, called in METRICS.items():
            values = [run[metric] for run in runs]
            each = " ".join(f"{value:.3f}" for value in values)
            print(f"| `{way}` | {called} | {each} | {statistics.mean(values):.3f} | {statistics.stdev(values):.3f} |")


def train(arguments: argparse.Namespace, way: str, seed: int) -> dict[str, float]:
    """The metrics of a run."""
    name = f"{way.rpartition('.')[2].replace('=', '-')}-{arguments.monitor.rpartition('/')[2]}-{seed}"
    if arguments.folder:
        data = ["data=image_folder", f"data.root={arguments.folder}", "data.image_size=64", "trainer.max_epochs=10"]
    else:
        table = uneven_digits(Path(arguments.runs_dir, "images"), seed)
        data = ["data=table", f"data.table={table}", "data.image_size=32", "data.augment=light", "trainer.max_epochs=8"]
        data += ["freeze.last_n=4", "trainer.threads=1"]
    words = [*data, way, f"checkpoint.monitor={arguments.monitor}", f"seed={seed}", f"name={name}", "logger=csv"]
    command = [sys.executable, "-m", "src.train", *words, f"runs_dir={arguments.runs_dir}", "baseline=none"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((Path(arguments.runs_dir) / name / "result.json").read_text())["metrics"]


def uneven_digits(folder: Path, seed: int) -> Path:
    """A table of scikit-learn's digits, other ones for each seed."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    table, digits = folder / f"{seed}.csv", load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["path,label,split"]
    for label in range(10):
        members = iter(np.random.default_rng([seed, label]).permutation(np.flatnonzero(digits.target == label)))
        for split, sizes in IMAGES.items():
            for _ in range(sizes[str(label) in RARE]):
                number = next(members)
                Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).save(folder / f"{number}.png")
                rows.append(f"{number}.png,{label},{split}")
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table


if __name__ == "__main__":
    main()
