"""From a decoded image to the square the model sees: uint8 (3, H, W) -> uint8 (3, S, S).

Normalisation is not done here but on the device (src/models/network.py): a batch travels as bytes, a quarter of the size.
Transforms draw from the global generators, which src/engine/runs/seeding.py sets for every image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from src.engine.weights.preprocessing import Preprocessing

Transform = Callable[[torch.Tensor], torch.Tensor]

# Of an image this many times as long as wide, the ends are cut off before it is resized, not after: a strip of 2 x 60,000
# pixels would become one of 256 x 7,680,000.
_STRIP = 8


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Resize and cut the centre, as the preprocessing says: what val, test and predict use."""
    return partial(_fit, preprocessing)


def train_transform(preprocessing: Preprocessing, augment: str) -> Transform:
    """none: as for val. light: small shifts, turns and scales, nothing mirrored (digits, text, x-rays).

    standard: a random crop of 25 to 100 % of the area, mirrored half the time, a little colour: photographs.
    strong: standard with TrivialAugment (Mueller and Hutter, 2021) and a patch erased: more epochs, less overfitting.
    What a shift or a turn uncovers gets the colour of the image's edge.
    """
    size, interpolation = preprocessing.image_size, _interpolation(preprocessing)
    if augment == "none":
        return eval_transform(preprocessing)
    if augment == "light":
        affine = v2.RandomAffine(10, (0.08, 0.08), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
        return v2.Compose([eval_transform(preprocessing), partial(_on_edge_colour, affine)])
    steps: list[Transform] = [
        v2.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=interpolation, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if augment == "standard":
        return v2.Compose([*steps, v2.ColorJitter(0.2, 0.2, 0.2)])
    assert augment == "strong", augment
    # torchvision's reference erases after normalising, to 0: before it, that is the mean.
    mean = [round(255 * level) for level in preprocessing.mean]
    return v2.Compose([*steps, _trivial_augment, v2.RandomErasing(p=0.25, value=mean)])


def _fit(preprocessing: Preprocessing, image: torch.Tensor) -> torch.Tensor:
    size = preprocessing.image_size
    if preprocessing.crop_mode == "center":
        height, width = image.shape[-2:]
        target = preprocessing.resized(height, width)
        if max(height, width) > _STRIP * min(height, width):
            image, target = _without_ends(image, target)
    else:
        target = preprocessing.resized(*image.shape[-2:])
    image = F.resize(image, list(target), _interpolation(preprocessing), antialias=True)
    height, width = image.shape[-2:]
    if min(height, width) < size:
        spare = [max(0, size - width), max(0, size - height)]
        padding = [spare[0] // 2, spare[1] // 2, (spare[0] + 1) // 2, (spare[1] + 1) // 2]
        image = F.pad(image, padding, fill=list(preprocessing.border))
    return F.center_crop(image, [size, size])


def _without_ends(image: torch.Tensor, target: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
    """The middle of a strip, at least 4 times as long as wide, and what it is to be resized to: the centre stays the centre.

    As many pixels go at either end, and the new size is odd where the whole one's is, so that nothing moves by half a pixel.
    """
    axis = -2 if image.shape[-2] > image.shape[-1] else -1
    length, width = image.shape[axis], min(image.shape[-2:])
    kept = 4 * width + (length - 4 * width) % 2
    resized = round(target[axis] * kept / length)
    resized += (target[axis] - resized) % 2
    middle = image.narrow(axis, (length - kept) // 2, kept)
    return middle, (resized, target[1]) if axis == -2 else (target[0], resized)


def _on_edge_colour(affine: Transform, image: torch.Tensor) -> torch.Tensor:
    """As differences from the edge's colour, so that 0 is what affine uncovers; its own fill leaves a dark seam."""
    colour = torch.tensor(_edge_colour(image), dtype=torch.float32).view(3, 1, 1)
    return (affine(image - colour) + colour).round_().clamp_(0, 255).to(torch.uint8)


def _trivial_augment(image: torch.Tensor) -> torch.Tensor:
    return v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR, fill=_edge_colour(image))(image)


def _edge_colour(image: torch.Tensor) -> list[float]:
    """The median of the outermost pixels per channel: the background of pages, digits and x-rays, whatever colour it has."""
    edge = torch.cat([image[:, 0], image[:, -1], image[:, 1:-1, 0], image[:, 1:-1, -1]], dim=1)
    return edge.median(dim=1).values.tolist()


def _interpolation(preprocessing: Preprocessing) -> v2.InterpolationMode:
    return v2.InterpolationMode(preprocessing.interpolation)
