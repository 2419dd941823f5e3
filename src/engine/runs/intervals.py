"""How sure a share of images is, such as an accuracy: its 95 % interval. Other metrics: bootstrap.py."""

from __future__ import annotations

import math

Z = 1.96  # standard deviations on both sides that hold 95 % of a normal distribution
PROPORTIONS = ("acc", "subset_acc")  # metrics that are shares of the images


def share_interval(share: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a share that was measured on so many images: E. B. Wilson, 1927, Journal of the American
    Statistical Association 22, p. 209. It is right for few images and for shares near 0 and 1 too."""
    if images == 0:
        return 0.0, 1.0
    scale = 1 + Z**2 / images
    centre = (share + Z**2 / (2 * images)) / scale
    half = Z * math.sqrt(share * (1 - share) / images + Z**2 / (4 * images**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
