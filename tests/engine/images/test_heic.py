"""HEIC, the format of phones: read with the extra heic, and named by the message without it."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from src.engine.images.formats import HEIC_EXTENSIONS
from src.engine.images.reading import ImageError, ReadOptions, decode_image
from src.engine.images.scanning import is_image
from tests.conftest import command_environment
from tests.engine.images.odd_images import ORIENTATIONS, colour_ramp, orientation_exif

needs_heic = pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="pillow-heif is an extra")


def heic(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "HEIF", quality=-1, chroma=444, **options)
    return buffer.getvalue()


@needs_heic
def test_pixels_are_those_that_were_saved():
    ramp = colour_ramp().astype(np.uint8)
    pixels = np.asarray(decode_image(heic(Image.fromarray(ramp)), "a.heic", ReadOptions()).image)
    assert pixels.shape == ramp.shape
    assert np.abs(pixels.astype(int) - ramp).max() <= 3  # lossless, but for the way to YCbCr and back
    assert all(is_image(f"a{ending}") for ending in HEIC_EXTENSIONS)


@needs_heic
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_it_is_upright(orientation):
    ramp = Image.fromarray(colour_ramp().astype(np.uint8))
    png = io.BytesIO()
    ramp.save(png, "PNG", exif=orientation_exif(orientation))
    upright = np.asarray(decode_image(png.getvalue(), "a.png", ReadOptions()).image).astype(int)
    pixels = np.asarray(
        decode_image(heic(ramp, exif=orientation_exif(orientation).tobytes()), "a.heic", ReadOptions()).image
    )
    assert pixels.shape == upright.shape
    assert np.abs(pixels - upright).max() <= 3


@needs_heic
def test_transparency_is_laid_on_the_background():
    clear = Image.new("RGBA", (64, 64), (9, 200, 9, 0))
    clear.putpixel((3, 3), (9, 200, 9, 255))
    decoded = decode_image(heic(clear), "a.heic", ReadOptions(background=(255, 0, 0)))
    assert np.abs(np.array(decoded.image.getpixel((50, 50))) - (255, 0, 0)).max() <= 3


@needs_heic
def test_large_and_damaged_ones_are_refused():
    data = heic(Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)))
    with pytest.raises(ImageError, match=r"0\.1 megapixels, the limit is 0\.05"):
        decode_image(data, "a.heic", ReadOptions(max_megapixels=0.05))
    for damaged in (data[: len(data) // 2], data[:60]):
        with pytest.raises(ImageError, match=r"a\.heic: "):
            decode_image(damaged, "a.heic", ReadOptions())


def test_without_the_extra_the_message_names_it(tmp_path):
    """As where pillow-heif is not installed."""
    code = f"""
import importlib.util as util
from pathlib import Path
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "pillow_heif" else find(name, *rest)
from src.engine.images.reading import ImageError, ReadOptions, read_image
from src.engine.images.scanning import Omissions, images_below
folder = Path({str(tmp_path)!r})
for name in ("a.heic", "a.jpg"):
    (folder / name).write_bytes(b"\\0\\0\\0\\x18ftypheic\\0\\0\\0\\0mif1heic")
left_out = Omissions()
print([path.name for path in images_below(folder, left_out)], left_out.sentences(folder))
try:
    read_image(folder / "a.jpg", ReadOptions())
except ImageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=command_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "['a.jpg']" in done.stdout
    assert done.stdout.count('pip install -e ".[heic]"') == 2, done.stdout
