"""What an ensemble of folds is worth: accuracy on images that none of its runs has seen, beside one run's, with several seeds.

    python scripts/benchmarks/folds.py --root drawings/ [--seeds 3] [KEY=VALUE ...]     a folder for each class

A fifth of each class is held out from all runs, the same for every seed. For each seed a run and five folds are trained on
the rest; both are measured on what was held out, with and without tta=flip. p is of McNemar's exact test, the folds' mean
against the one run. KEY=VALUE are settings of src.train. 12 trainings for each seed.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.engine.runs.intervals import share_interval
from src.engine.runs.paired import compared_images

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("data=image_folder", "baseline=none", "report.page=false", "logger=csv")
MODELS = ("one run", "one run, tta=flip", "one fold, mean of the five", "all five", "all five, tta=flip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        number = deal(options.root, folder)
        rows: dict[str, list[float]] = {name: [] for name in MODELS}
        for seed in range(options.seeds):
            for name, accuracy in measure_seed(folder, seed, options.words).items():
                rows[name].append(accuracy)
            print(f"seed {seed}: {', '.join(f'{name} {values[-1]:.3f}' for name, values in rows.items())}", flush=True)
    print(
        f"\n{number} images held out\n\n| model | {' | '.join(f'seed {seed}' for seed in range(options.seeds))} | mean |"
    )
    print("|---" * (options.seeds + 2) + "|")
    for name, values in rows.items():
        mean = statistics.mean(values)
        low, high = share_interval(mean, number)
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {mean:.3f} ({low:.2f} to {high:.2f}) |")


def deal(root: Path, folder: Path) -> int:
    """Copies the images to folder/seen/CLASS and folder/held_out/CLASS; returns how many are held out."""
    number = 0
    for source in sorted(path for path in root.iterdir() if path.is_dir()):
        files = sorted(source.iterdir())
        random.Random(source.name).shuffle(files)
        for place, file in enumerate(files):
            held = place < len(files) // 5
            number += held
            target = folder / ("held_out" if held else "seen") / source.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return number


def measure_seed(folder: Path, seed: int, words: list[str]) -> dict[str, float]:
    """Accuracy of each of MODELS; prints p."""
    one, folds = f"one{seed}", f"folds{seed}"
    for name, more in ((one, ()), (folds, ("data.folds=5",))):
        where = (f"data.root={folder}/seen", f"runs_dir={folder}/runs", f"name={name}")
        call("train", *QUICK, *where, f"seed={seed}", *more, *words)
    right = {
        MODELS[0]: evaluated(folder, one),
        MODELS[1]: evaluated(folder, one, "tta=flip"),
        MODELS[3]: evaluated(folder, folds),
        MODELS[4]: evaluated(folder, folds, "tta=flip"),
    }
    shares = {name: statistics.mean(each.values()) for name, each in right.items()}
    alone = [evaluated(folder, f"{folds}/fold_{fold}") for fold in range(5)]
    shares[MODELS[2]] = statistics.mean(statistics.mean(each.values()) for each in alone)
    for name, other in ((MODELS[3], MODELS[0]), (MODELS[4], MODELS[3])):
        gains = np.array([float(own) - right[other][image] for image, own in right[name].items()])
        p, _ = compared_images(gains, None)
        counts = f"{(gains > 0).sum()} to {(gains < 0).sum()} images"
        print(f"seed {seed}: {name} against {other}: {counts}, p = {p:.2g}")
    return {name: shares[name] for name in MODELS}


def evaluated(folder: Path, run: str, *words: str) -> dict[str, bool]:
    """Image -> whether it was right."""
    out = folder / "measured"
    call("evaluate", f"run={folder}/runs/{run}", f"data.root={folder}/held_out", f"out={out}", *words)
    with (out / "evaluation_predictions.csv").open(newline="", encoding="utf-8") as lines:
        rows = {row["path"]: row["true"] == row["predicted"] for row in csv.DictReader(lines)}
    shutil.rmtree(out)
    return rows


def call(program: str, *words: str) -> None:
    command = [sys.executable, "-m", f"src.{program}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
