"""From a decoded picture to the square the model sees: uint8 (3, H, W) -> uint8 (3, S, S).

Normalisation is not done here but on the device (src/models/network.py): a batch travels as bytes, a quarter of the size.
Transforms draw from the global generators, which src/seeding.py sets for every picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torchvision.transforms import v2

from src.preprocessing import Preprocessing

Transform = Callable[[torch.Tensor], torch.Tensor]


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Resize the shorter side, cut the centre: what val, test and predict use."""
    size = preprocessing.image_size
    return v2.Compose(
        [
            v2.Resize(round(size / preprocessing.crop_ratio), _interpolation(preprocessing), antialias=True),
            v2.CenterCrop(size),
        ]
    )


def train_transform(preprocessing: Preprocessing, augment: str) -> Transform:
    """none: as for val. light: small shifts, turns and scales, nothing mirrored (digits, text, x-rays).

    standard: a random crop of 25 to 100 % of the area, mirrored half the time, a little colour: photographs.
    strong: standard with TrivialAugment (Mueller and Hutter, 2021) and a patch erased: more epochs, less overfitting.
    """
    size, interpolation = preprocessing.image_size, _interpolation(preprocessing)
    if augment == "none":
        return eval_transform(preprocessing)
    if augment == "light":
        affine = v2.RandomAffine(10, (0.08, 0.08), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
        return v2.Compose([eval_transform(preprocessing), affine])
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=interpolation, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if augment == "standard":
        return v2.Compose([*steps, v2.ColorJitter(0.2, 0.2, 0.2)])
    assert augment == "strong", augment
    return v2.Compose([*steps, v2.TrivialAugmentWide(), v2.RandomErasing(p=0.25)])


def _interpolation(preprocessing: Preprocessing) -> v2.InterpolationMode:
    return v2.InterpolationMode(preprocessing.interpolation)
