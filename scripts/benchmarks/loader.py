"""Images a second that one core reads, decodes and augments: this project's loader against torchvision's usual one.

    python scripts/benchmarks/loader.py [--images 200] [--rounds 5] [--size 224]

Drawn JPEGs of 500x375, 2000x1500 and 4032x3024 whose files have the size of photographs'. A: a DataLoader of ImageFolder with
RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, and with Resize and CenterCrop for evaluation. B: this
project's loader with the same augmentation, which leaves the normalisation to the device. C: B with the image bank. One
process, one thread, no loader processes. A, B and C alternate; medians of the rounds are shown, of CPU time, so that what
others do on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from src import rules  # noqa: F401 (registers the settings)
from src.config import Data
from src.data.sources import load_images
from src.engine.images.image_loader import LoaderSettings
from src.engine.images.loading import eval_loader, train_loader
from src.engine.images.resizing import interpolation_of, with_side_to_keep
from src.engine.images.sampler import EpochSampler
from src.engine.weights.preprocessing import Preprocessing
from src.tasks.multiclass import Multiclass

BATCH = 20
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw(folder: Path, images: int, size: tuple[int, int]) -> None:
    """Smooth noise with grain, whose JPEGs have the size of photographs'."""
    for number in range(images):
        random = np.random.default_rng(number)
        small = random.integers(0, 256, (24, 32, 3)).astype(np.uint8)
        large = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        large += random.integers(-12, 13, large.shape, dtype=np.int16)
        target = folder / f"class{number % 4}" / f"{number:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(target, quality=90)


def usual(folder: Path, size: int) -> dict[str, DataLoader]:
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    crop = transforms.RandomResizedCrop(size, scale=(0.25, 1.0))
    ways = {
        "train": [crop, transforms.RandomHorizontalFlip(), *end],
        "eval": [transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size), *end],
    }
    return {
        name: DataLoader(ImageFolder(folder, transforms.Compose(steps)), BATCH, shuffle=name == "train")
        for name, steps in ways.items()
    }


def ours(folder: Path, size: int, image_bank: str) -> dict[str, Iterable]:
    """As src/data/module.py builds them, with the augmentation of A."""
    data = Data(source="image_folder", root=str(folder), image_bank=image_bank)
    places = {"cache_dir": folder.parent / "runs/.checked", "bad_list": folder.parent / "bad.txt"}
    preprocessing = Preprocessing(size, 0.875, "bilinear", MEAN, STD)
    images = load_images(with_side_to_keep(data, preprocessing), Multiclass(), 0, **places)
    everything = [*range(len(images.names))]
    images = replace(images, splits={"train": everything, "val": everything, "test": []})
    interpolation = interpolation_of(preprocessing)
    crop = v2.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=interpolation, antialias=True)
    augment = v2.Compose([crop, torch.Tensor.contiguous, v2.RandomHorizontalFlip()])
    settings = LoaderSettings(BATCH)
    return {
        "train": train_loader(images, augment, EpochSampler(everything, BATCH, 0), settings, size),
        "eval": eval_loader(images, "val", preprocessing, settings),
    }


def seconds(loader: Iterable) -> float:
    begin = time.process_time()  # others on the machine do not count
    for _ in loader:
        pass
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 200), ("rounds", 5), ("size", 224)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)

    print("| images | transform | ImageFolder, images/s | this project | with the image bank |\n|---|---|---|---|---|")
    for shape, number in (
        ((500, 375), options.images),
        ((2000, 1500), options.images // 4),
        ((4032, 3024), options.images // 10),
    ):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "photos"
            draw(folder, number, shape)
            loaders = {"usual": usual(folder, options.size)}
            loaders |= {f"bank {word}": ours(folder, options.size, word) for word in ("off", "auto")}
            for way in ("train", "eval"):
                times: dict[str, list[float]] = {name: [] for name in loaders}
                for _ in range(options.rounds):
                    for name, both in loaders.items():
                        times[name].append(seconds(both[way]))
                rates = [number / statistics.median(times[name]) for name in loaders]
                shown = [f"{rate:.0f} ({rate / rates[0]:.2f} x)" for rate in rates]
                print(f"| {shape[0]}x{shape[1]} | {way} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
