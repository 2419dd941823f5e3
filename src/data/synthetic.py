"""Images drawn by a function of (seed, index): a bright disc on noise, whose colour and place tell the class."""

from __future__ import annotations

import colorsys

import torch

from src.engine.runs import seeding

SIDE = 40  # pixels


def draw(seed: int, num_classes: int, index: int) -> torch.Tensor:
    """uint8 (3, 40, 40). Class index % num_classes has a colour of its own."""
    generator = seeding.generator(seed, "synthetic", index)
    label = index % num_classes
    noise = torch.randint(0, 90, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    centre = torch.randint(12, SIDE - 12, (2,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 81
    colour = torch.tensor([round(255 * level) for level in colorsys.hsv_to_rgb(label / num_classes, 0.9, 0.9)])
    return torch.where(disc, colour.to(torch.uint8)[:, None, None], noise)
