"""Writes images in the modes and formats that go wrong elsewhere, with the RGB values each must be read as.

Used by tests/engine/images/test_reading.py and by tests that train on a mixed folder. The expected values are computed by numpy
from the stored ones and never by the code under test; transparency is expected on white.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features

HEIGHT, WIDTH = 24, 32
# EXIF orientation -> the side of the upright image where the stored row 0 and column 0 lie (TIFF 6.0, page 36)
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@dataclass(frozen=True)
class OddImage:
    """expected: (H, W, 3) uint8. tolerance: the largest difference allowed; above 0 where the format is lossy."""

    expected: np.ndarray
    tolerance: int


def write_odd_images(folder: Path) -> dict[str, OddImage]:
    """Writes the images into the folder; name -> what must be read."""
    folder.mkdir(parents=True, exist_ok=True)
    odd: dict[str, OddImage] = {}

    def add(name: str, expected: np.ndarray, tolerance: int = 0) -> Path:
        rgb = expected if expected.ndim == 3 else np.repeat(expected[:, :, None], 3, axis=2)
        odd[name] = OddImage(np.rint(rgb).astype(np.uint8), tolerance)
        return folder / name

    colour, grey = colour_ramp(), colour_ramp()[:, :, 0]
    alpha = np.tile(np.linspace(0, 255, HEIGHT).astype(np.uint8)[:, None], (1, WIDTH))
    image = Image.fromarray(colour)

    image.save(add("rgb.jpg", colour, 6), quality=95, subsampling=0)
    Image.fromarray(stored_as(colour, 6)).save(
        add("rotated.jpg", colour, 6), quality=95, subsampling=0, exif=orientation_exif(6)
    )
    cmyk = np.dstack([colour, alpha // 2])
    ink = 255 - cmyk.astype(float)
    Image.frombytes("CMYK", (WIDTH, HEIGHT), cmyk.tobytes()).save(
        add("cmyk.jpg", ink[:, :, :3] * ink[:, :, 3:] / 255, 8), quality=95, subsampling=0
    )
    image.save(add("colours.bmp", colour))
    image.save(add("colours.ppm", colour))
    frames = [Image.fromarray(255 - colour)]
    image.save(add("animated.webp", colour), save_all=True, append_images=frames, lossless=True)
    if features.check("avif"):
        image.save(add("colours.avif", colour, 10), quality=95, subsampling="4:4:4")

    rgba = np.dstack([colour, alpha])
    Image.fromarray(rgba).save(add("rgba.png", on_white(colour, alpha), 1))
    Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))).save(add("la.png", on_white(grey, alpha), 1))
    bilevel = (colour[:, :, 1] > 100) * 255
    Image.fromarray(bilevel.astype(np.uint8)).convert("1", dither=Image.Dither.NONE).save(add("bilevel.png", bilevel))

    palette = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 30], [250, 240, 5]], np.uint8)
    indices = ((np.arange(HEIGHT)[:, None] // 3 + np.arange(WIDTH) // 4) % 4).astype(np.uint8)
    looked_up = palette[indices]
    _palette_image(indices, palette).save(add("palette.png", looked_up))
    opacity = np.array([0, 255, 100, 255], np.uint8)
    path = add("palette_transparent.png", on_white(looked_up, opacity[indices]), 1)
    _palette_image(indices, palette).save(path, transparency=opacity.tobytes())
    frames = [_palette_image((indices + 1) % 4, palette)]
    _palette_image(indices, palette).save(add("animated.gif", looked_up), save_all=True, append_images=frames)

    _add_wide(add, grey, colour)
    _add_one_clear_colour(add)
    return odd


def write_corrupt_images(folder: Path) -> list[str]:
    """Writes an empty file, half a JPEG and a text, all named .jpg; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is not an image\n" * 20)
    truncated = folder / "truncated.jpg"
    Image.fromarray(colour_ramp()).save(truncated, quality=95)
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size * 3 // 4])
    return ["empty.jpg", "text.jpg", "truncated.jpg"]


def _add_wide(add, grey: np.ndarray, colour: np.ndarray) -> None:
    """More than 8 bits a channel."""
    sixteen = grey.astype(np.uint16) * 257 - np.uint16(100) * (grey > 0)
    rows = [row.astype(">u2").tobytes() for row in sixteen]
    write_png(add("grey16.png", sixteen / 257), (WIDTH, HEIGHT), 16, 0, rows)
    Image.fromarray(sixteen).save(add("grey16.tif", sixteen / 257))
    deep = colour.astype(np.uint16) * 257
    write_png(add("rgb16.png", colour), (WIDTH, HEIGHT), 16, 2, [row.astype(">u2").tobytes() for row in deep])
    header = f"P5 {WIDTH} {HEIGHT} 65535\n".encode()
    add("grey16.pgm", sixteen / 257).write_bytes(header + sixteen.astype(">u2").tobytes())
    for name, counts in {
        "int32.tif": sixteen.astype(np.int32) * 10,
        "negative.tif": sixteen.astype(np.int32) - 5000,
    }.items():
        spread = (counts - counts.min()) / (counts.max() - counts.min()) * 255
        Image.fromarray(counts).save(add(name, spread))
    unit = (grey / 255).astype(np.float32)
    Image.fromarray(unit * np.float32(0.5)).save(add("float_unit.tif", grey * 0.5, 1))
    heights = unit * 3000 - 500
    heights[0, 0], heights[0, 1], heights[0, 2] = np.nan, np.inf, -np.inf
    finite = heights[np.isfinite(heights)].astype(float)
    ramp = (heights.astype(float) - finite.min()) / (finite.max() - finite.min()) * 255
    ramp[0, :3] = 0, 255, 0
    Image.fromarray(heights).save(add("float_heights.tif", ramp))
    Image.fromarray(np.full((HEIGHT, WIDTH), 90, np.float32)).save(add("float_constant.tif", np.full_like(grey, 90)))


def _add_one_clear_colour(add) -> None:
    """PNGs without an alpha channel whose tRNS chunk names one colour that is transparent."""
    levels = np.tile(np.arange(16, dtype=np.uint8), (HEIGHT, 2))
    shown = np.where(levels == 3, 255, levels * 17)
    clear = [(b"tRNS", struct.pack(">H", 3))]
    eight = np.where(levels == 3, 3, levels * 17).astype(np.uint8)
    write_png(add("grey8_trns.png", shown), (WIDTH, HEIGHT), 8, 0, [row.tobytes() for row in eight], clear)
    packed = levels[:, 0::2] << 4 | levels[:, 1::2]
    write_png(add("grey4_trns.png", shown), (WIDTH, HEIGHT), 4, 0, [row.tobytes() for row in packed], clear)
    quarter = levels % 4
    packed = quarter[:, 0::4] << 6 | quarter[:, 1::4] << 4 | quarter[:, 2::4] << 2 | quarter[:, 3::4]
    clear_grey = [(b"tRNS", struct.pack(">H", 1))]
    path = add("grey2_trns.png", np.where(quarter == 1, 255, quarter * 85))
    write_png(path, (WIDTH, HEIGHT), 2, 0, [row.tobytes() for row in packed], clear_grey)
    wide = levels.astype(">u2") * 17 * 257
    clear = [(b"tRNS", struct.pack(">H", 3 * 17 * 257))]
    write_png(
        add("grey16_trns.png", shown), (WIDTH, HEIGHT), 16, 0, [row.tobytes() for row in wide.astype(">u2")], clear
    )
    rgb = np.dstack([levels * 17, levels * 3, 255 - levels]).astype(np.uint8)
    shown = np.where(levels[:, :, None] == 3, 255, rgb)
    clear = [(b"tRNS", struct.pack(">HHH", 51, 9, 252))]
    write_png(add("rgb_trns.png", shown), (WIDTH, HEIGHT), 8, 2, [row.tobytes() for row in rgb], clear)
    deep = (rgb.astype(np.uint16) * 256 + 7).astype(">u2")
    clear = [(b"tRNS", struct.pack(">HHH", 51 * 256 + 7, 9 * 256 + 7, 252 * 256 + 7))]
    write_png(add("rgb16_trns.png", shown), (WIDTH, HEIGHT), 16, 2, [row.tobytes() for row in deep], clear)


def colour_ramp() -> np.ndarray:
    """(H, W, 3) uint8; smooth, so that JPEG keeps it, and different in all four corners."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.dstack([x * 8, y * 10, 200 - x * 2 - y * 4]).astype(np.uint8)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) with alpha (H, W) over white, as floats."""
    weight = (alpha if pixels.ndim == 2 else alpha[:, :, None]) / 255
    return pixels * weight + 255 * (1 - weight)


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera that writes this EXIF orientation stores the image (H, W, 3)."""
    row_side, column_side = ORIENTATIONS[orientation]
    stored = upright.swapaxes(0, 1) if row_side in ("left", "right") else upright
    if row_side in ("right", "bottom"):
        stored = stored[::-1]
    if column_side in ("right", "bottom"):
        stored = stored[:, ::-1]
    return np.ascontiguousarray(stored)


def orientation_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def write_png(path: Path, size: tuple[int, int], depth: int, colour_type: int, rows, chunks=()) -> None:
    """A PNG from packed rows (an iterable of bytes), for the kinds that Pillow reads but cannot write.

    chunks: (name, content) pairs that go before the pixels.
    """
    packer = zlib.compressobj(1)
    pixels = b"".join([*(packer.compress(b"\0" + row) for row in rows), packer.flush()])
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]:
            checksum = zlib.crc32(name + content)
            file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum))


def _palette_image(indices: np.ndarray, palette: np.ndarray) -> Image.Image:
    image = Image.frombytes("P", (indices.shape[1], indices.shape[0]), indices.astype(np.uint8).tobytes())
    image.putpalette(palette.tobytes())
    return image
