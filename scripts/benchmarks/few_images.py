"""What trainer.max_epochs=auto is worth with few images: test accuracy with 12 epochs, with auto, and of the baseline.

    python scripts/benchmarks/few_images.py [--per-class 4 16] [--seeds 3] [KEY=VALUE ...]     the digits
    python scripts/benchmarks/few_images.py --root drawings/ --per-class 8 data.image_size=96   a folder for each class

Each seed draws other training and val images (a fifth as many); the test images, at most 40 of a class, stay the same.
KEY=VALUE are settings of src.train.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FEWEST = 3  # images of a class; smaller classes are left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--per-class", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or write_digits(Path(folder) / "digits")
        for number in options.per_class:
            rows: dict[str, list[float]] = {"baseline": []}
            for seed in range(options.seeds):
                sets = Path(folder) / f"{number}-{seed}"
                deal(root, sets, number, seed)
                for epochs in ("12", "auto"):
                    words = (f"data.root={sets}", f"trainer.max_epochs={epochs}", f"seed={seed}", *options.words)
                    result = train(Path(folder) / f"runs-{number}-{seed}-{epochs}", *words)
                    rows.setdefault(f"max_epochs={epochs}, {result['steps']} steps", []).append(accuracy(result))
                rows["baseline"].append(accuracy(result["baseline"]))
            for name, values in rows.items():
                spread = f" (std {statistics.stdev(values):.3f})" if len(values) > 1 else ""
                shown = " ".join(f"{value:.3f}" for value in values)
                print(
                    f"{number:3} per class  {name:30} {shown}   mean {statistics.mean(values):.3f}{spread}", flush=True
                )


def write_digits(root: Path) -> Path:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).resize((64, 64)).save(root / str(label) / f"{index}.png")
    return root


def deal(root: Path, out: Path, number: int, seed: int) -> None:
    """Copies the images to out/train, out/val and out/test."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        random.Random(0).shuffle(files)
        test, rest = files[: min(40, len(files) // 3)], files[min(40, len(files) // 3) :]
        if len(test) < FEWEST:
            continue
        random.Random(seed).shuffle(rest)
        val = max(1, min(number, len(rest)) // 5)
        for split, members in (("test", test), ("val", rest[:val]), ("train", rest[val : val + number])):
            (out / split / folder.name).mkdir(parents=True, exist_ok=True)
            for file in members:
                shutil.copy2(file, out / split / folder.name)


def train(runs: Path, *words: str) -> dict:
    command = [sys.executable, "-m", "src.train", "data=image_folder", "logger=csv", "name=run", f"runs_dir={runs}"]
    subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
    return json.loads((runs / "run/result.json").read_text())


def accuracy(result: dict) -> float:
    return result["metrics"]["test/acc"]


if __name__ == "__main__":
    main()
