"""Augmentation: from a decoded image to the square that training sees, uint8 (3, H, W) -> uint8 (3, S, S).

Normalisation is not done here but on the device (src/models/network.py): a batch travels as bytes, a quarter of the size.
Transforms draw from the global generators, which src/engine/runs/seeding.py sets for every image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torchvision.transforms import v2

from src.engine.images.resizing import Transform, check_transform, eval_transform, interpolation_of
from src.engine.own import build_part, is_own
from src.engine.weights.preprocessing import Preprocessing


def train_transform(preprocessing: Preprocessing, augment: str) -> Transform:
    """What data.augment names: one of TRANSFORMS, or your own by its name, such as src.my_transforms.build, a function that
    gets the preprocessing and gives a transform. What a shift or a turn uncovers has the colour of the image's edge."""
    transform = build_part("data.augment", augment, TRANSFORMS, {"preprocessing": preprocessing}, {}, Callable)
    if is_own(augment):
        check_transform(augment, transform, preprocessing.image_size)
        return v2.Compose([torch.Tensor.contiguous, transform])  # a file's pixels lie in another order
    return transform


def light(preprocessing: Preprocessing) -> Transform:
    """Small shifts, turns and scales, nothing mirrored (digits, text, x-rays)."""
    affine = v2.RandomAffine((-10, 10), (0.08, 0.08), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose([eval_transform(preprocessing), partial(_on_edge_colour, affine)])


def standard(preprocessing: Preprocessing) -> Transform:
    """A random crop of 25 to 100 % of the area, mirrored half the time, a little colour: photographs."""
    return v2.Compose([*_crop(preprocessing), v2.ColorJitter(0.2, 0.2, 0.2)])


def strong(preprocessing: Preprocessing) -> Transform:
    """Standard's crop with TrivialAugment (Mueller and Hutter, 2021) and a patch erased: more epochs, less overfitting."""
    # torchvision's reference erases after normalising, to 0: before it, that is the mean.
    mean: Any = [round(255 * level) for level in preprocessing.mean]
    return v2.Compose([*_crop(preprocessing), _trivial_augment, v2.RandomErasing(p=0.25, value=mean)])


def _crop(preprocessing: Preprocessing) -> list[Transform]:
    size, interpolation = preprocessing.image_size, interpolation_of(preprocessing)
    crop = v2.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=interpolation, antialias=True)
    return [crop, torch.Tensor.contiguous, v2.RandomHorizontalFlip()]


TRANSFORMS = {"none": eval_transform, "light": light, "standard": standard, "strong": strong}


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
