"""Pixels of more than 8 bits a channel brought to 8: grey of 16 and 32 bits, floats, and colour of 16 bits a channel.

Cameras and scanners of 10 to 14 bits write 16-bit files. Divided by 257, a 12-bit picture would keep 17 levels of 255. So
the check finds how many bits a set uses (src/data/checking.py), and every picture of the set is divided alike.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageFile

GREY_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
NO_DATA, WHITE_IS_ZERO, OWN_RANGE, PLANES = "no-data", "white-is-zero", "own range", "planes"

_GDAL_NODATA = 42113  # https://gdal.org/en/stable/drivers/raster/gtiff.html
_BITS_PER_SAMPLE, _PLANAR_CONFIGURATION = 258, 284
_NATIVE = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}
_HUGE = 1e19  # no measurement: -3.4e38, 9.97e36 (netCDF), 1e20 (CMIP) and the like stand for no data
_SENTINELS = (-32768, -32767, -(2**31), *(1 - 10**digits for digits in range(3, 10)))  # -999, -9999, ...


@dataclass
class Found:
    """What was noticed in a picture. bits: how many its 16-bit channels use; 0 for a picture without such channels."""

    bits: int = 0
    notes: set[str] = field(default_factory=set)


def grey_to_eight_bits(image: Image.Image, bits: int, white_is_zero: bool, found: Found) -> Image.Image:
    """Grey of a mode in GREY_MODES as mode L, or LA if one grey is transparent.

    Whole numbers from 0 to 65535: 0..2**bits-1 maps to 0..255; bits=0 takes the picture's own. Other whole numbers, and
    floats outside of 0..1, are stretched from min..max of the values that count; no-data values become black.
    white_is_zero: the largest value is black.
    """
    values = np.asarray(image)
    counting = _counting(values, image)
    some = values[counting]
    if values.size > some.size:
        found.notes.add(NO_DATA)
    low, high = (float(some.min()), float(some.max())) if some.size else (0.0, 0.0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        found.bits = max(1, int(high).bit_length())
        grey = _table(bits or found.bits)[np.where(counting, values, 0)]
    else:
        if image.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        else:
            found.notes.add(OWN_RANGE)
        stretched = np.where(counting, values, low).astype(np.float64)
        if high > low:
            stretched = (stretched - low) * (255 / (high - low))
        grey = np.rint(stretched.clip(0, 255)).astype(np.uint8)
        grey[np.isposinf(values)] = 255
    if white_is_zero:
        grey = 255 - grey
        found.notes.add(WHITE_IS_ZERO)
    grey[~counting & ~np.isposinf(values)] = 0
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def correct_layout(image: ImageFile.ImageFile) -> None:
    """What Pillow would misread, put right before the pixels are loaded.

    libtiff gives values in the machine's byte order, also those of a big-endian file. A PPM of 16 bits becomes one of 16-bit
    colour, whose low bytes Pillow throws away.
    """
    for place, tile in enumerate(image.tile):
        if tile.codec_name == "libtiff" and tile.args[0] in _NATIVE:
            image.tile[place] = tile._replace(args=(_NATIVE[tile.args[0]], *tile.args[1:]))
        elif tile.codec_name == "ppm" and tile.args == ("RGB", 65535):
            image.tile[place] = tile._replace(codec_name="raw", args=("RGB;16B", 0, 1))


def has_sixteen_bit_colour(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow would keep only the high bytes of its colours, or misread them. To be asked before image.load()."""
    return image.mode in ("RGB", "RGBA") and bool(image.tile) and _layout(image) is not None


def colour_to_eight_bits(
    image: ImageFile.ImageFile, open_again: Callable[[], ImageFile.ImageFile], bits: int, found: Found
) -> Image.Image:
    """Colour of 16 bits a channel as RGB, RGBA or RGBa: 0..2**bits-1 maps to 0..255; bits=0 takes the picture's own.

    image: not loaded yet. Where all 16 bits are used, the high bytes are kept: Pillow's way.
    """
    layout = _layout(image)
    if layout != "RGBa" and ";16" in rawmode_of(image.tile[0]):
        image.load()
        found.bits = 8 + max(high for _, high in image.getextrema()[:3]).bit_length()
        if (bits or found.bits) == 16:
            return image
        if getattr(image, "tag_v2", {}).get(_PLANAR_CONFIGURATION) == 2:
            found.notes.add(PLANES)  # libtiff gives Pillow the upper bytes alone
    values = _sixteen_bit_values(open_again, layout)
    found.bits = max(1, int(values[..., : 1 if layout == "LA" else 3].max()).bit_length())
    clear = open_again().info.get("transparency")
    if layout == "LA":
        values = values[..., [0, 0, 0, 1]]
    elif layout == "RGB" and clear is not None:
        values = np.dstack([values, np.where((values == clear).all(axis=2), 0, 65535)])
    table = _table(bits or found.bits)
    eight = table[values[..., :3]]
    if values.shape[2] == 3:
        return Image.fromarray(eight)
    pixels = np.dstack([eight, table[values[..., 3]]])
    return Image.frombytes("RGBa" if layout == "RGBa" else "RGBA", image.size, pixels.tobytes())


def _counting(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Which of the values are measurements: (H, W) bool."""
    counting = np.ones(values.shape, bool)
    if image.mode == "F":
        counting = np.abs(values) < _HUGE  # False for nan, too
    tags = getattr(image, "tag_v2", {})
    if _GDAL_NODATA in tags:
        with contextlib.suppress(ValueError, OverflowError):  # not a number of this type: no pixel can have it
            counting &= values != values.dtype.type(float(str(tags[_GDAL_NODATA]).strip(" \0")))
    if image.mode in ("I", "F") and counting.any():
        lowest = values[counting].min()
        others = values[counting & (values > lowest)]
        # A usual sentinel counts as one where it lies further below the rest than the rest is wide.
        if lowest in _SENTINELS and others.size and float(others.min()) - lowest > float(others.max()) - others.min():
            counting &= values > lowest
    return counting


@lru_cache(maxsize=17)
def _table(bits: int) -> np.ndarray:
    """Value -> level of 0..255; what is above the bits is white."""
    top = 2**bits - 1
    return np.rint(np.minimum(np.arange(65536), top) * (255 / top)).astype(np.uint8)


def _layout(image: ImageFile.ImageFile) -> str | None:
    """RGB, RGBX, RGBA, RGBa or LA for colour of 16 bits a channel, None for any other."""
    rawmode = rawmode_of(image.tile[0])
    if ";16" in rawmode:
        return rawmode.partition(";")[0]
    # Pillow takes the planes of an uncompressed TIFF for 8 bits whatever they have.
    if rawmode != "R" or 16 not in getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ()):
        return None
    return "RGBa" if "a" in map(rawmode_of, image.tile) else image.mode


def rawmode_of(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else tile.args[0]


def _sixteen_bit_values(open_again: Callable[[], ImageFile.ImageFile], layout: str) -> np.ndarray:
    """(H, W, C) int. Pillow gives one byte of each channel at a time, and which one follows from the byte order it is told."""
    if layout == "LA":  # four bytes a pixel, as RGBA has
        four = decoded_as(open_again(), lambda rawmode: "RGBA").astype(int)
        return four[..., 0::2] * 256 + four[..., 1::2]
    order = "L" if getattr(getattr(open_again(), "tag_v2", None), "prefix", b"") == b"II" else "B"
    native = "L" if sys.byteorder == "little" else "B"

    def high(rawmode: str) -> str:
        base, _, own = rawmode.replace("a", "A").partition(";16")
        return f"{base};16{(own or order).replace('N', native)}"

    def low(rawmode: str) -> str:
        told = high(rawmode)
        return told[:-1] + ("L" if told.endswith("B") else "B")

    return decoded_as(open_again(), high).astype(int) * 256 + decoded_as(open_again(), low)


def decoded_as(image: ImageFile.ImageFile, rawmode: Callable[[str], str]) -> np.ndarray:
    """The pixels, unpacked in another way than the file asks for."""
    image.tile = [
        tile._replace(
            args=rawmode(tile.args) if isinstance(tile.args, str) else (rawmode(tile.args[0]), *tile.args[1:])
        )
        for tile in image.tile
        if rawmode_of(tile) != ";"  # Pillow's name for a plane that has no meaning
    ]
    image.load()
    return np.asarray(image)
