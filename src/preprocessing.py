"""How a picture becomes a backbone's input, as plain values that travel with the weights.

backbones.pretrained_preprocessing() fills it from the values that the weights were trained with; the data rooms follow
the geometry (resize, crop), models/network.py the arithmetic (/255, normalise); model.json keeps it. No torch import:
the command line reads it too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


@dataclass(frozen=True)
class Preprocessing:
    """The steps, in order, for a uint8 picture (3, H, W):

    1. its shorter side is resized to resize_size = round(image_size / crop_ratio), with this interpolation
    2. the centre square of image_size is cut out
    3. it is divided by 255, and per channel (RGB) mean is subtracted and std divided by

    Raises ValueError for values that cannot be meant.
    """

    image_size: int  # side of the square the backbone sees, in pixels
    crop_ratio: float  # share of the shorter side that the centre crop keeps
    interpolation: str  # one of INTERPOLATIONS, always antialiased
    mean: tuple[float, float, float]  # RGB, of values in 0..1
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, not {self.image_size}")
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio must be above 0 and at most 1, not {self.crop_ratio}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std need one value for each of R, G, B, not {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {self.std}")

    @property
    def resize_size(self) -> int:
        """What the shorter side is resized to, in pixels."""
        return round(self.image_size / self.crop_ratio)

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
