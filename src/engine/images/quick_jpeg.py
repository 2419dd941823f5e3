"""JPEG decoded by TorchCodec where it is installed (the extra torchcodec): the pixels that Pillow gives, in less time.

Both are libjpeg-turbo with the same settings. Only the plain case is decoded here, a colour image that lies upright. For
anything else, and what TorchCodec refuses, the answer is None: then reading.py decodes it, or says what is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from PIL import ImageFile

from src.engine.images.strips import budget
from src.engine.weights.preprocessing import ReadOptions

log = logging.getLogger(__name__)


def decode(
    data: bytes, options: ReadOptions, open_image: Callable[[bytes], ImageFile.ImageFile]
) -> torch.Tensor | None:
    """The bytes of a file -> uint8 (3, H, W), whose memory is (H, W, 3). open_image: reads the header, by Pillow."""
    if not is_installed() or not data.startswith(b"\xff\xd8\xff") or (decoder := _decoder()) is None:
        return None
    try:
        image = open_image(data)
        megapixels = image.width * image.height / 1e6
        plain = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(274, 1) == 1
        # Of a large image Pillow decodes a half or a quarter, in less time.
        if not plain or megapixels > options.max_megapixels or options.shrink_of(*image.size) > 1:
            return None
        with budget.reserved(megapixels):
            pixels = decoder(data)
    except Exception:  # for Pillow it may be readable, or it says why not
        return None
    return pixels if pixels.shape == (3, image.height, image.width) else None


@cache
def is_installed() -> bool:
    return find_spec("torchcodec") is not None


@cache
def _decoder() -> Callable[[bytes], torch.Tensor] | None:
    try:
        return import_module("torchcodec.decoders").decode_jpeg
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # made for another torch
        log.warning(f"torchcodec cannot be used, Pillow decodes instead: {str(error).splitlines()[0]}")
        return None
