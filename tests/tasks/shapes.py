"""Drawings with a known answer: a green disc, a red square, blue stripes, in any combination, on grey noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("disc", "square", "stripes")


def draw(names: list[str], seed: int, size: int = 48) -> Image.Image:
    random = np.random.default_rng(seed)
    pixels = random.integers(90, 150, (size, size, 3))
    y, x = np.mgrid[:size, :size]
    left, top = random.integers(2, size - 20, 2)
    if "square" in names:
        pixels[top : top + 16, left : left + 16] = (230, 30, 30)
    left, top = random.integers(10, size - 10, 2)
    if "disc" in names:
        pixels[(y - top) ** 2 + (x - left) ** 2 < 81] = (30, 220, 40)
    if "stripes" in names:
        pixels[(x + left) % 8 < 2] = (30, 40, 235)
    return Image.fromarray(pixels.astype(np.uint8))


def write_shapes(folder: Path, number: int = 120) -> list[list[str]]:
    """images/000.png, ..., labels.csv with a column label, and columns.csv with a column for each. Returns the labels."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(7)
    labels = [
        [name for name, shown in zip(NAMES, row, strict=True) if shown] for row in random.random((number, 3)) < 0.4
    ]
    paths = [f"images/{index:03d}.png" for index in range(number)]
    for index, (path, names) in enumerate(zip(paths, labels, strict=True)):
        draw(names, index).save(folder / path)
    rows = [f"{path},{'; '.join(reversed(names))}" for path, names in zip(paths, labels, strict=True)]
    (folder / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    cells = [",".join(str(int(name in names)) for name in NAMES) for names in labels]
    rows = [f"{path},{cell}" for path, cell in zip(paths, cells, strict=True)]
    (folder / "columns.csv").write_text("\n".join([f"path,{','.join(NAMES)}", *rows]) + "\n")
    return labels
