"""Large images are converted a strip at a time, so that next to the decoded image there is one more, not five."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom

_PIXELS = 2**22  # of a strip
_AT_ONCE = 100.0  # megapixels that the threads of a process decode at the same time, at 8 bytes each


def strips(image: Image.Image) -> Iterator[tuple[Box, Image.Image]]:
    """(box, part) of an image, from top to bottom. An image that is not large is a single part: the image itself."""
    width, height = image.size
    rows = max(1, _PIXELS // max(1, width))
    if rows >= height:
        yield (0, 0, width, height), image
        return
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        yield box, image.crop(box)


def as_grey(image: Image.Image, convert: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """A new image of mode L, of what `convert` makes of the pixels of each strip."""
    result = Image.new("L", image.size)
    for box, strip in strips(image):
        result.paste(Image.fromarray(convert(np.asarray(strip))), box)
    return result


class MegapixelBudget:
    """So many megapixels may be decoded at the same time."""

    def __init__(self, megapixels: float) -> None:
        self.total = self.free = megapixels
        self.changed = threading.Condition()

    @contextmanager
    def reserved(self, megapixels: float) -> Iterator[None]:
        """Waits until so many megapixels are free; an image larger than all of them is decoded alone."""
        share = min(megapixels, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= share)
            self.free -= share
        try:
            yield
        finally:
            with self.changed:
                self.free += share
                self.changed.notify_all()


budget = MegapixelBudget(_AT_ONCE)
