"""JPEG by TorchCodec: the pixels and the messages of Pillow."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image

from src.engine.images import quick_jpeg
from src.engine.images.reading import ImageError, ReadOptions, pixels_of
from tests.engine.images.odd_images import ORIENTATIONS, orientation_exif

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchcodec") is None, reason="torchcodec is an extra")

LEVELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
PHOTO = Image.fromarray(LEVELS).resize((333, 251), Image.Resampling.BICUBIC)
KINDS = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}, {"restart_marker_rows": 1}]
KINDS += [{"exif": orientation_exif(number)} for number in ORIENTATIONS]


def jpeg(image: Image.Image = PHOTO, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(data: bytes, monkeypatch, options: ReadOptions) -> torch.Tensor:
    with monkeypatch.context() as context:
        context.setattr(quick_jpeg, "is_installed", lambda: False)
        return pixels_of(data, "a.jpg", options)[0]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_are_those_of_pillow(options, mode, monkeypatch):
    data = jpeg(PHOTO.convert(mode), **options)
    assert torch.equal(pixels_of(data, "a.jpg", ReadOptions())[0], by_pillow(data, monkeypatch, ReadOptions()))


def test_a_plain_photo_is_not_decoded_by_pillow(monkeypatch):
    monkeypatch.setattr("src.engine.images.reading.decode_image", None)
    assert pixels_of(jpeg(), "a.jpg", ReadOptions())[0].shape == (3, 251, 333)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_what_is_cut_off_is_refused_as_by_pillow(share, monkeypatch):
    data = jpeg()[: int(share * len(jpeg()))]
    with pytest.raises(ImageError) as expected:
        by_pillow(data, monkeypatch, ReadOptions())
    with pytest.raises(ImageError) as refused:
        pixels_of(data, "a.jpg", ReadOptions())
    assert str(refused.value) == str(expected.value)


def test_images_above_the_limit_are_refused():
    with pytest.raises(ImageError, match=r"0\.1 megapixels, the limit is 0\.05"):
        pixels_of(jpeg(), "a.jpg", ReadOptions(max_megapixels=0.05))
