"""What all peers are given: a folder of drawn photographs, and a ResNet18 with random weights. The same at every call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from scripts.benchmarks.peers.programs.job import CLASSES, MEAN, STD

WIDTH, HEIGHT = 500, 375


def draw_images(folder: Path, counts: dict[str, int], seed: int) -> None:
    """JPEGs in folder/SPLIT/CLASS/, as many as counts has for each split, the classes in turn."""
    for part, (split, count) in enumerate(counts.items()):
        for number in range(count):
            target = folder / split / f"class{number % CLASSES}" / f"{number:05d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            image = draw_image(number % CLASSES, np.random.default_rng((seed, part, number)))
            Image.fromarray(image).save(target, quality=90)


def draw_image(label: int, random: np.random.Generator) -> np.ndarray:
    """uint8 (375, 500, 3): smooth noise with grain, whose JPEG has a photograph's size, below stripes.

    The class is in the stripes' direction (one of four) and in the tint (one of eight); both vary from image to image.
    """
    small = random.integers(0, 256, (24, 32, 3)).astype(np.uint8)
    image = np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.float32)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    angle = np.pi / 4 * (label % 4 + random.normal(0, 0.15))
    period = random.uniform(14, 22)  # pixels
    phase = 2 * np.pi * (rows * np.sin(angle) + columns * np.cos(angle)) / period
    image += random.uniform(60, 100) * np.sin(phase + random.uniform(0, 2 * np.pi))[..., None]
    hue = 2 * np.pi * (label / CLASSES + np.arange(3) / 3)
    image *= 1 + 0.3 * np.cos(hue) + random.normal(0, 0.04, 3)
    image += random.integers(-12, 13, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def write_weights(file: Path, seed: int) -> None:
    """A state dict of torchvision's resnet18 for CLASSES: random, but a frozen backbone's features tell the classes apart.

    BatchNorm has the statistics of drawn images, and its last bias makes features sparse. With 0 and 1, with which they
    begin, all images have nearly the same features, and a head's accuracy jumps from step to step.
    """
    import torch  # takes seconds
    from torchvision.models import resnet18
    from torchvision.transforms import v2

    torch.manual_seed(seed)
    network = resnet18(num_classes=CLASSES).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches
    drawn = [draw_image(number % CLASSES, np.random.default_rng((seed, number))) for number in range(64)]
    images = v2.functional.resize(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2), [224])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        for batch in images.split(32):
            network((batch / 255 - mean) / std)
        network.layer4[1].bn2.bias.fill_(-1.5)
    torch.save(network.state_dict(), file)
