"""How an image becomes a backbone's input, as plain values that travel with the weights.

backbone_names.pretrained_preprocessing() fills it from the values that the weights were trained with; the data rooms follow
the geometry (resize, crop), models/network.py the arithmetic (/255, normalise); model.json keeps it. No torch import:
the command line reads it too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from src.engine.runs.plain_values import check, limited

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
CROP_MODES = ("center", "squash", "border")
ROUNDINGS = ("round", "floor")


@dataclass(frozen=True)
class ReadOptions:
    background: tuple[int, int, int] = (255, 255, 255)  # RGB, laid under transparent images
    max_megapixels: float = 100.0  # larger images are refused
    bits: int = 16  # of the 16-bit channels of the set: 2**bits-1 is white. 0: as many as the image itself uses
    # Large images are halved, up to three times, as long as the shorter side keeps this many pixels; 0: never.
    keep_side: int = 0

    def shrink_of(self, width: int, height: int) -> int:
        """By which of 1, 2, 4 and 8 an image of this size is divided."""
        if not self.keep_side:
            return 1
        return max(factor for factor in (1, 2, 4, 8) if factor == 1 or min(width, height) // factor >= self.keep_side)


@dataclass(frozen=True)
class Preprocessing:
    """The steps, in order, for a uint8 image (3, H, W):

    1. it is resized to resize_size = image_size / crop_ratio, rounded, with this interpolation. crop_mode says what gets
       that size: center: its shorter side; squash: both sides; border: its longer side
    2. the centre square of image_size is cut out. Where the image is smaller, a border is added: black, or for
       crop_mode=border of the colour mean
    3. it is divided by 255, and per channel (RGB) mean is subtracted and std divided by

    Raises ValueError for values that cannot be meant.
    """

    image_size: int = limited(range=(1, 4096))  # side of the square the backbone sees, in pixels
    crop_ratio: float = limited(
        range=(1e-3, 2)
    )  # share of the resized side that the centre crop keeps; above 1: a border
    interpolation: str = limited(options=INTERPOLATIONS)  # always antialiased
    mean: tuple[float, float, float] = limited(range=(-100, 100))  # RGB, of values in 0..1
    std: tuple[float, float, float] = limited(range=(1e-4, 1e4))
    crop_mode: str = limited("center", options=CROP_MODES)  # as timm has them
    rounding: str = limited(
        "round", options=ROUNDINGS
    )  # of resize_size: torchvision's weights round, timm's take the floor

    def __post_init__(self) -> None:
        check(self)

    @property
    def resize_size(self) -> int:
        """What a side is resized to, in pixels; which one says crop_mode."""
        size = self.image_size / self.crop_ratio
        return max(1, math.floor(size) if self.rounding == "floor" else round(size))

    @property
    def border(self) -> tuple[int, int, int]:
        """The colour of a border, 0 to 255, where the resized image is smaller than image_size."""
        return tuple(round(255 * level) for level in self.mean) if self.crop_mode == "border" else (0, 0, 0)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image after the resize."""
        size = self.resize_size
        if self.crop_mode == "squash":
            return size, size
        if self.crop_mode == "border":
            longer = max(height, width)
            return max(1, round(height * size / longer)), max(1, round(width * size / longer))
        return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for model.json."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of to_dict, also after a way through JSON. TypeError for a missing or unknown key."""
        values = dict(values)
        for key in ("mean", "std"):
            if key in values:
                values[key] = tuple(values[key])
        return cls(**values)
