"""Head training on the feature bank against one pass of the backbone over the same images, as commands from start to end.

    python scripts/benchmarks/feature_bank.py [--images 2000] [--epochs 20] [--rounds 3] [--threads 2] [--without]

Drawn JPEGs of 500x375 in 8 classes at 224 pixels, for resnet18 and efficientnet_lite0 with random weights. A: `src.train` with
freeze.preset=head_only and data.augment=none, its check of the images, baseline, checkpoints and report included, in an empty
runs_dir. B: a script that reads the same images with ImageFolder and a DataLoader, and computes the features. They alternate;
medians are shown. --without: also A with feature_bank.views=0 baseline=none, once, of a quarter of the epochs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BACKBONES = ("resnet18", "efficientnet_lite0")
CLASSES = 8

PASS = """
import sys, torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from src.engine.weights.preprocessing import Preprocessing
from src.models.network import Architecture, build_network
folder, backbone, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
steps = [v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()]
loader = DataLoader(ImageFolder(folder, v2.Compose(steps)), batch_size=32, num_workers=int(threads))
preprocessing = Preprocessing(224, 0.875, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
network = build_network(Architecture(backbone, "linear", 8), preprocessing).eval()
with torch.inference_mode():
    features = torch.cat([network.features(images) for images, _ in loader])
torch.save(features, sys.argv[1] + ".pt")
"""


def draw(folder: Path, images: int) -> None:
    """Smooth noise, whose JPEGs have the size of photographs'."""
    for number in range(images):
        random = np.random.default_rng(number)
        target = folder / f"class{number % CLASSES}" / f"{number:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 256, (24, 32, 3)).astype(np.uint8)
        small[..., number % 3] //= 1 + number % CLASSES
        large = np.asarray(Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        large += random.integers(-12, 13, large.shape, dtype=np.int16)
        Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(target, quality=90)


def seconds(command: list[str], threads: int) -> float:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    begin = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def train(photos: Path, backbone: str, epochs: int, *words: str) -> list[str]:
    runs = tempfile.mkdtemp(dir=photos.parent)
    fixed = ("data=image_folder", f"data.root={photos}", "data.image_size=224", "model.weights=none")
    head = ("freeze.preset=head_only", "data.augment=none", f"trainer.max_epochs={epochs}", f"runs_dir={runs}")
    return [sys.executable, "-m", "src.train", *fixed, *head, f"model.backbone={backbone}", *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 2000), ("epochs", 20), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--without", action="store_true")
    options = parser.parse_args()

    print("| backbone | head training, s | one pass, s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        draw(photos, options.images)
        for backbone in BACKBONES:
            times: dict[str, list[float]] = {"train": [], "pass": []}
            for _ in range(options.rounds):
                times["train"].append(seconds(train(photos, backbone, options.epochs), options.threads))
                once = [sys.executable, "-c", PASS, str(photos), backbone, str(options.threads)]
                times["pass"].append(seconds(once, options.threads))
            ours, one = (statistics.median(times[name]) for name in ("train", "pass"))
            print(f"| {backbone} | {ours:.1f} | {one:.1f} | {ours / one:.2f} |", flush=True)
            if options.without:
                epochs = max(1, options.epochs // 4)
                words = train(photos, backbone, epochs, "feature_bank.views=0", "baseline=none")
                rest = seconds(words, options.threads)
                print(f"| {backbone}, {epochs} epochs without the bank | {rest:.1f} | | {rest / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
