"""From a decoded image to the square that val, test and predict see: uint8 (3, H, W) -> uint8 (3, S, S)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from src.engine.commands.schema import Data
from src.engine.own import is_own, owner_errors, wrong_result
from src.engine.weights.preprocessing import Preprocessing

Transform = Callable[[torch.Tensor], torch.Tensor]

# Of an image this many times as long as wide, the ends are cut off before it is resized, not after: a strip of 2 x 60,000
# pixels would become one of 256 x 7,680,000.
_STRIP = 8


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Resize and cut the centre, as the preprocessing says: what val, test and predict use."""
    return partial(_fit, preprocessing)


def _fit(preprocessing: Preprocessing, image: torch.Tensor) -> torch.Tensor:
    size = preprocessing.image_size
    if preprocessing.crop_mode == "center":
        height, width = image.shape[-2:]
        target = preprocessing.resized(height, width)
        if max(height, width) > _STRIP * min(height, width):
            image, target = _without_ends(image, target)
    else:
        target = preprocessing.resized(*image.shape[-2:])
    image = F.resize(image, list(target), interpolation_of(preprocessing), antialias=True)
    height, width = image.shape[-2:]
    if min(height, width) < size:
        spare = [max(0, size - width), max(0, size - height)]
        padding = [spare[0] // 2, spare[1] // 2, (spare[0] + 1) // 2, (spare[1] + 1) // 2]
        image = F.pad(image, padding, fill=list(preprocessing.border))
    return F.center_crop(image, [size, size]).contiguous()


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


def with_side_to_keep(data: Data, preprocessing: Preprocessing) -> Data:
    """With a number in data.keep_side (ReadOptions): twice the size that images are resized to, of which the resize and the
    crops of data.augment lose nothing; but how small a piece an own augmentation cuts out, nobody knows."""
    if data.keep_side is not None:
        return data
    return replace(data, keep_side=0 if is_own(data.augment) else 2 * preprocessing.resize_size)


def interpolation_of(preprocessing: Preprocessing) -> v2.InterpolationMode:
    return v2.InterpolationMode(preprocessing.interpolation)


def check_transform(name: str, transform: Transform, size: int) -> None:
    """Raises UserError where an own transform raises, or gives no square of bytes. name: its setting's value."""
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    with owner_errors("data.augment", name), torch.random.fork_rng(devices=[]):
        output = transform(image)
    if not isinstance(output, torch.Tensor) or output.dtype != torch.uint8 or output.shape != (3, size, size):
        is_tensor = isinstance(output, torch.Tensor)
        found = f"{output.dtype} {tuple(output.shape)}" if is_tensor else f"a {type(output).__name__}"
        raise wrong_result("data.augment", name, f"uint8 (3, {size}, {size}) for an image uint8 (3, 48, 64)", found)
