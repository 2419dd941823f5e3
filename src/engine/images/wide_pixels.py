"""Pixels of more than 8 bits a channel brought to 8: grey of 16 and 32 bits, floats, and colour of 16 bits a channel.

Cameras and scanners of 10 to 14 bits write 16-bit files. Divided by 257, a 12-bit image would keep 17 levels of 255. So
the check finds how many bits a set uses (src/engine/images/checking.py), and every image of the set is divided alike.
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
from PIL.TiffImagePlugin import OPEN_INFO

from src.engine.images.strips import Box, as_grey, strips

GREY_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
NO_DATA, WHITE_IS_ZERO, OWN_RANGE, PLANES = "no-data", "white-is-zero", "own range", "planes"

_GDAL_NODATA = 42113  # https://gdal.org/en/stable/drivers/raster/gtiff.html
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR_CONFIGURATION = 258, 262, 284
_NATIVE = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}
_HUGE = 1e19  # no measurement: -3.4e38, 9.97e36 (netCDF), 1e20 (CMIP) and the like stand for no data
_SENTINELS = (-32768, -32767, -(2**31), *(1 - 10**digits for digits in range(3, 10)))  # -999, -9999, ...

# Pillow turns white-is-zero round for up to 8 bits; of deeper kinds it reads some as they are and does not know the others.
for (order, photometric, *kind), modes in list(OPEN_INFO.items()):
    if photometric == 1 and len(kind[2]) == 1 and kind[2][0] > 8:
        OPEN_INFO.setdefault((order, 0, *kind), modes)


@dataclass
class Findings:
    """What was noticed in an image. bits: how many its 16-bit channels use; 0 for an image without such channels."""

    bits: int = 0
    notes: set[str] = field(default_factory=set)


def grey_to_eight_bits(image: Image.Image, bits: int, findings: Findings) -> Image.Image:
    """Grey of a mode in GREY_MODES as mode L, or LA if one grey is transparent; of white-is-zero the largest value is black.

    Whole numbers from 0 to 65535: 0..2**bits-1 maps to 0..255; bits=0 takes the image's own. Other whole numbers, and
    floats outside of 0..1, are stretched from min..max of the values that count; no-data values become black.
    """
    white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    counting, low, high, all_count = _measured(image)
    if not all_count:
        findings.notes.add(NO_DATA)
    is_float, stretched = image.mode == "F", image.mode == "F" or low < 0 or high > 65535
    if is_float and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif stretched:
        findings.notes.add(OWN_RANGE)
    else:
        findings.bits = max(1, int(high).bit_length())
    table = None if stretched else _table(bits or findings.bits)

    def convert(values: np.ndarray) -> np.ndarray:
        valid = counting(values)
        if table is not None:
            grey = table[np.where(valid, values, 0)]
        else:
            levels = np.where(valid, values, low).astype(np.float64)
            if high > low:
                levels = (levels - low) * (255 / (high - low))
            grey = np.rint(levels.clip(0, 255)).astype(np.uint8)
            grey[np.isposinf(values)] = 255
        if white_is_zero:
            grey = 255 - grey
        grey[~valid & ~np.isposinf(values)] = 0
        return grey

    if white_is_zero:
        findings.notes.add(WHITE_IS_ZERO)
    grey = as_grey(image, convert)
    if "transparency" not in image.info:
        return grey
    clear = image.info["transparency"]
    return Image.merge("LA", (grey, as_grey(image, lambda values: 255 * (values != clear).astype(np.uint8))))


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


def colour_to_eight_bits(
    image: ImageFile.ImageFile, open_again: Callable[[], ImageFile.ImageFile], bits: int, findings: Findings
) -> Image.Image:
    """Colour of 16 bits a channel as RGB or RGBA: 0..2**bits-1 maps to 0..255; bits=0 takes the image's own.

    image: not loaded yet, and sixteen_bit_layout knows it. Where all 16 bits are used, the high bytes are kept: Pillow's way.
    Colours that are multiplied by alpha stay so.
    """
    layout = sixteen_bit_layout(image) or ""
    if layout != "RGBa" and ";16" in rawmode_of(image.tile[0]):
        image.load()
        findings.bits = 8 + max(high for _, high in image.getextrema()[:3]).bit_length()
        if (bits or findings.bits) == 16:
            return image
        if getattr(image, "tag_v2", {}).get(_PLANAR_CONFIGURATION) == 2:
            findings.notes.add(PLANES)  # libtiff gives Pillow the upper bytes alone
    image.close()  # its pixels: 4 bytes each
    pixels, values = _sixteen_bit_values(open_again, layout)
    findings.bits = max(1, *(int(values(box)[..., :3].max()).bit_length() for box, _ in strips(pixels)))
    clear = pixels.info.pop("transparency", None)
    alpha = Image.new("L", pixels.size, 255) if layout == "RGB" and clear is not None else None
    table = _table(bits or findings.bits)
    for box, _ in strips(pixels):
        sixteen = values(box)
        if alpha:
            alpha.paste(Image.fromarray(255 * (sixteen != clear).any(axis=2).astype(np.uint8)), box)
        pixels.paste(Image.fromarray(table[sixteen]), box)
    if alpha:
        pixels.putalpha(alpha)
    return pixels


def _measured(image: Image.Image) -> tuple[Callable[[np.ndarray], np.ndarray], float, float, bool]:
    """What tells measurements from other values, (H, W) -> (H, W) bool; their lowest and highest; whether all values are."""
    no_data = getattr(image, "tag_v2", {}).get(_GDAL_NODATA)

    def valid(values: np.ndarray) -> np.ndarray:
        is_float = values.dtype.kind == "f"
        counting = np.abs(values) < _HUGE if is_float else np.ones(values.shape, bool)  # False for nan, too
        if no_data is not None:
            with contextlib.suppress(ValueError, OverflowError):  # not a number of this type: no pixel can have it
                counting &= values != values.dtype.type(float(str(no_data).strip(" \0")))
        return counting

    def above(values: np.ndarray) -> np.ndarray:
        return valid(values) & (values > lowest)

    lowest, highest, counted = _extremes(image, valid)
    total = image.width * image.height
    if image.mode in ("I", "F") and counted and lowest in _SENTINELS:
        second, _, others = _extremes(image, above)
        # A usual sentinel counts as one where it lies further below the rest than the rest is wide.
        if others and float(second) - lowest > float(highest) - second:
            return above, float(second), float(highest), False
    return valid, float(lowest), float(highest), counted == total


def _extremes(image: Image.Image, counting: Callable[[np.ndarray], np.ndarray]) -> tuple[Any, Any, int]:
    """The lowest and the highest value that counts, and how many do; 0, 0, 0 where none does."""
    extremes, counted = [], 0
    for _, strip in strips(image):
        values = np.asarray(strip)
        some = values[counting(values)]
        if some.size:
            extremes += [some.min(), some.max()]
            counted += some.size
    return (min(extremes), max(extremes), counted) if extremes else (0.0, 0.0, 0)


@lru_cache(maxsize=17)
def _table(bits: int) -> np.ndarray:
    """Value -> level of 0..255; values that need more bits are white."""
    top = 2**bits - 1
    return np.rint(np.minimum(np.arange(65536), top) * (255 / top)).astype(np.uint8)


def sixteen_bit_layout(image: ImageFile.ImageFile) -> str | None:
    """RGB, RGBX, RGBA, RGBa or LA for colour of 16 bits a channel, of which Pillow would keep the high bytes alone, or which it
    would misread; None for any other. To be asked before image.load()."""
    if image.mode not in ("RGB", "RGBA") or not image.tile:
        return None
    rawmode = rawmode_of(image.tile[0])
    if ";16" in rawmode:
        return rawmode.partition(";")[0]
    # Pillow reads the planes of every uncompressed TIFF as 8 bits.
    if rawmode != "R" or 16 not in getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ()):
        return None
    return "RGBa" if "a" in map(rawmode_of, image.tile) else image.mode


def rawmode_of(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else tile.args[0]


def _sixteen_bit_values(
    open_again: Callable[[], ImageFile.ImageFile], layout: str
) -> tuple[ImageFile.ImageFile, Callable[[Box], np.ndarray]]:
    """An image to write on, and what gives the values (h, w, 3 or 4) uint16 of a box that was not written on yet.

    Pillow gives one byte of each channel at a time, and which one follows from the byte order it is told.
    """
    if layout == "LA":  # four bytes a pixel, as RGBA has
        four = decoded_as(open_again(), lambda rawmode: "RGBA")

        def of_four(box: Box) -> np.ndarray:
            pixels = np.asarray(four.crop(box)).astype(np.uint16)
            return (pixels[..., 0::2] * 256 + pixels[..., 1::2])[..., [0, 0, 0, 1]]

        return four, of_four
    order = "L" if getattr(getattr(open_again(), "tag_v2", None), "prefix", b"") == b"II" else "B"
    native = "L" if sys.byteorder == "little" else "B"

    def high(rawmode: str) -> str:
        base, _, own = rawmode.replace("a", "A").partition(";16")
        return f"{base};16{(own or order).replace('N', native)}"

    def low(rawmode: str) -> str:
        told = high(rawmode)
        return told[:-1] + ("L" if told.endswith("B") else "B")

    upper, lower = decoded_as(open_again(), high), decoded_as(open_again(), low)

    def of_two(box: Box) -> np.ndarray:
        return np.asarray(upper.crop(box)).astype(np.uint16) * 256 + np.asarray(lower.crop(box))

    return upper, of_two


def decoded_as(image: ImageFile.ImageFile, rawmode: Callable[[str], str]) -> ImageFile.ImageFile:
    """The image loaded, its pixels unpacked in another way than the file asks for."""
    image.tile = [
        tile._replace(
            args=rawmode(tile.args) if isinstance(tile.args, str) else (rawmode(tile.args[0]), *tile.args[1:])
        )
        for tile in image.tile
        if rawmode_of(tile) != ";"  # Pillow's name for a plane that has no meaning
    ]
    image.load()
    return image
