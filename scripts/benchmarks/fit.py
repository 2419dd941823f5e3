"""Steps of a training against those of a hand-written loop: images a second, and peak memory.

    python scripts/benchmarks/fit.py [--rounds 3] [--threads 2] [--size 128] [KEY=VALUE ...]

Everything of a ResNet18 is trained with batches of 32 drawn images in memory. A: a loop of a few lines in plain PyTorch.
B: `src.train`, with its memory log, checks for nan, checkpoints and metrics.csv, whose images_per_second is read. Each is a
process of its own, they alternate, and the first of the EPOCHS epochs does not count. KEY=VALUE are settings of src.train.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGES, EPOCHS, BATCH = 460, 4, 32  # 70 % of the images are trained

LOOP = """
import sys, time, torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.v2 import functional as F
from src.data.synthetic import draw
threads, size, number, epochs, batch = map(int, sys.argv[1:])
torch.set_num_threads(threads)
images = [draw(0, 3, index) for index in range(number)]
labels = torch.arange(number) % 3
mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
model = resnet18(num_classes=3).to(memory_format=torch.channels_last).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(epochs):
    begin, losses = time.perf_counter(), []
    for indices in torch.randperm(number).split(batch):
        pixels = torch.stack([F.resize(images[i], [size, size], antialias=True) for i in indices])
        inputs = ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels[indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(number / (time.perf_counter() - begin))
"""


def measured(command: list[str], threads: int) -> tuple[str, float]:
    """What a process prints, and the most memory that it had, in MiB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, printed
    return printed, used.ru_maxrss / 1024


def by_hand(threads: int, size: int) -> tuple[float, float]:
    numbers = map(str, (threads, size, round(0.7 * IMAGES), EPOCHS, BATCH))
    printed, mib = measured([sys.executable, "-c", LOOP, *numbers], threads)
    return statistics.median(map(float, printed.split()[1:])), mib


def by_us(threads: int, size: int, words: list[str]) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as runs:
        data = ("data=synthetic", f"data.num_images={IMAGES}", f"data.image_size={size}", "data.augment=none")
        model = ("model.backbone=resnet18", "model.weights=none", "freeze.preset=full")
        rest = (f"trainer.max_epochs={EPOCHS}", "baseline=none", "name=run", f"runs_dir={runs}", *words)
        _, mib = measured([sys.executable, "-m", "src.train", *data, *model, *rest], threads)
        with (Path(runs) / "run/metrics.csv").open(newline="") as file:
            rates = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(rates[1:]), mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 3), ("threads", 2), ("size", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    hand, ours = [], []
    for _ in range(options.rounds):
        hand.append(by_hand(options.threads, options.size))
        ours.append(by_us(options.threads, options.size, options.words))
    print("| training | images/s | peak MiB |\n|---|---|---|")
    for name, pairs in (("hand-written loop", hand), ("src.train", ours)):
        rate, mib = (statistics.median(column) for column in zip(*pairs, strict=True))
        base_rate, base_mib = (statistics.median(column) for column in zip(*hand, strict=True))
        print(f"| {name} | {rate:.1f} ({rate / base_rate:.2f} x) | {mib:.0f} ({mib / base_mib:.2f} x) |")


if __name__ == "__main__":
    main()
