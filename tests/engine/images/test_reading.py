"""One image file: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features
from torch.utils.data import DataLoader, Dataset

from src.engine.images import reading
from src.engine.images.formats import EXTENSIONS
from src.engine.images.reading import ImageError, ReadOptions, decode_image, read_image, to_rgb
from tests.engine.images.odd_images import (
    ORIENTATIONS,
    colour_ramp,
    orientation_exif,
    stored_as,
    write_corrupt_images,
    write_odd_images,
    write_png,
)

# pytest puts its own warning filters over the one that reading.py sets; that one is tested in a subprocess below.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

OPTIONS = ReadOptions()
REPOSITORY = Path(__file__).parents[3]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n%%EndComments\nshowpage\n%%EOF\n"


def pixels(path: Path, options: ReadOptions = OPTIONS) -> np.ndarray:
    """(H, W, 3) as int, so that differences do not wrap."""
    return read_image(path, options).permute(1, 2, 0).numpy().astype(int)


def encode(form: str, **settings) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(colour_ramp()).save(buffer, form, **settings)
    return buffer.getvalue()


def test_odd_images_have_their_reference_pixels(tmp_path):
    odd = write_odd_images(tmp_path)
    assert len(odd) >= 20
    wrong = {}
    for name, image in odd.items():
        assert Path(name).suffix in EXTENSIONS
        read = pixels(tmp_path / name)
        if read.shape != image.expected.shape:
            wrong[name] = read.shape
        elif (difference := int(np.abs(read - image.expected).max())) > image.tolerance:
            wrong[name] = difference
    assert wrong == {}


def test_tensor_is_what_torch_expects(tmp_path):
    Image.fromarray(colour_ramp()).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", OPTIONS)
    assert read.shape == (3, 24, 32)
    assert read.dtype == torch.uint8
    assert read.is_contiguous()
    read += 1  # memory of its own, writable


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("form", "settings", "tolerance"), [("JPEG", {"quality": 95, "subsampling": 0}, 6), ("PNG", {}, 0), ("TIFF", {}, 0)]
)
def test_exif_orientation(tmp_path, orientation, form, settings, tolerance):
    stored = Image.fromarray(stored_as(colour_ramp(), orientation))
    stored.save(tmp_path / "a", form, exif=orientation_exif(orientation), **settings)
    read = pixels(tmp_path / "a")
    assert read.shape == (24, 32, 3)
    assert np.abs(read - colour_ramp()).max() <= tolerance


def test_exif_that_cannot_be_written_again_still_turns_the_image(tmp_path):
    """A text where EXIF wants a fraction: ImageOps.exif_transpose raises TypeError here."""
    exif = orientation_exif(3)
    exif[282] = 72.0  # XResolution
    data = bytearray(encode("JPEG", exif=exif, quality=95, subsampling=0))
    entry = data.find(b"\x01\x1a\x00\x05")  # tag 282, type 5 (fraction)
    assert entry > 0
    data[entry + 3] = 2  # type 2 (text)
    (tmp_path / "a.jpg").write_bytes(data)
    read = pixels(tmp_path / "a.jpg")
    assert np.abs(read - colour_ramp()[::-1, ::-1]).max() <= 6


def test_background_colour(tmp_path):
    clear = np.zeros((4, 5, 4), np.uint8)
    clear[:, 0] = 1, 2, 3, 255
    Image.fromarray(clear).save(tmp_path / "a.png")
    read = pixels(tmp_path / "a.png", ReadOptions(background=(10, 20, 30)))
    assert (read[:, 1:] == (10, 20, 30)).all()
    assert (read[:, 0] == (1, 2, 3)).all()


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "HSV", "YCbCr", "LAB", "RGBX", "I;16B", "I;16L", "I;16N"])
def test_modes_that_few_files_have(mode):
    """A uniform light grey, opaque: it stays that grey in every mode that can hold it."""
    light = 200
    if mode == "LAB":  # neutral; L* of sRGB 200
        linear = ((light / 255 + 0.055) / 1.055) ** 2.4
        image = Image.new("LAB", (3, 2), (round((116 * linear ** (1 / 3) - 16) * 2.55), 128, 128))
    elif mode.startswith("I;16"):
        order = "big" if mode.endswith("B") else "little"
        image = Image.frombytes(mode, (3, 2), (light * 257).to_bytes(2, order) * 6)
    else:
        colour = {"La": (light, 255), "HSV": (0, 0, light), "YCbCr": (light, 128, 128), "PA": (0, 255)}
        image = Image.new(mode, (3, 2), colour.get(mode, (light, light, light, 255)))
        if mode == "PA":
            image.putpalette([light] * 3)
    read = to_rgb(image, (0, 0, 255))
    assert read.mode == "RGB"
    assert np.abs(np.array(read).astype(int) - light).max() <= (2 if mode == "LAB" else 0)


def test_half_transparent_premultiplied():
    read = np.array(to_rgb(Image.new("RGBa", (2, 2), (100, 0, 0, 100)), (0, 0, 255)))
    assert np.abs(read.astype(int) - (100, 0, 155)).max() <= 1


@pytest.mark.parametrize("values", [[[np.nan, np.nan]], [[-3e38, 3e38]], [[np.inf, -np.inf]], [[1e9, 1e9]]])
def test_floats_without_a_usable_range(values, recwarn):
    read = np.array(to_rgb(Image.fromarray(np.array(values, np.float32)), (255, 255, 255)))
    assert read.shape == (1, 2, 3)
    assert read.dtype == np.uint8
    assert not recwarn.list


def test_corrupt_files_name_path_and_cause_in_one_line(tmp_path):
    causes = {"empty.jpg": "empty file", "text.jpg": "not an image of a format", "truncated.jpg": "ends too early"}
    assert set(write_corrupt_images(tmp_path)) == set(causes)
    for name, cause in causes.items():
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name, OPTIONS)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert cause in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)


FORMS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"] + ["AVIF"] * features.check("avif")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("missing", [5, 100, 300])
def test_truncated_file_is_refused_whatever_the_global_switch_says(monkeypatch, form, missing):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(form)
    assert decode_image(data, "whole", OPTIONS).image.size == (32, 24)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match=r"^cat/1\.x: "):
        decode_image(data[: max(len(data) - missing, 20)], "cat/1.x", OPTIONS)


def test_png_with_a_wrong_checksum_is_refused():
    """Pillow alone decodes it."""
    data = bytearray(encode("PNG"))
    data[-14] ^= 1  # the checksum of the pixels, before the 12 bytes of the last chunk
    Image.open(io.BytesIO(data)).load()
    with pytest.raises(ImageError, match="checksum"):
        decode_image(bytes(data), "a.png", OPTIONS)


def test_damaged_files_raise_nothing_but_image_error(capfd):
    random = np.random.default_rng(0)
    refused = 0
    for form in FORMS:
        data = encode(form, exif=orientation_exif(6)) if form in ("JPEG", "PNG", "TIFF", "WEBP") else encode(form)
        for _ in range(60):
            damaged = bytearray(data)
            for position in random.integers(0, min(len(data), 400), 4):
                damaged[position] = random.integers(256)
            try:
                decode_image(bytes(damaged), "a", ReadOptions(max_megapixels=1))
            except ImageError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1  # noqa: PT017
    assert refused > 50
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "content", [EPS, b"%PDF-1.4\n" + EPS, b"<svg></svg>", b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\0" * 99]
)
def test_no_other_format_is_opened_and_no_process_started(tmp_path, monkeypatch, content):
    started = []

    def start(*arguments, **settings):
        started.append(arguments)
        raise AssertionError("a process was started")

    for name in ("Popen", "check_call", "run", "call", "check_output"):
        monkeypatch.setattr(subprocess, name, start)
    monkeypatch.setattr(os, "system", start)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match="not an image of a format that is read"):
        read_image(tmp_path / "a.jpg", OPTIONS)
    assert started == []


def test_limit_is_ours_and_not_pillows(tmp_path):
    """20000 x 20000 is past the size at which Pillow raises DecompressionBombError while it opens the file."""
    write_png(tmp_path / "a.png", (20000, 20000), 8, 0, [b"\0"])
    with pytest.raises(ImageError, match=r"a\.png: 400\.0 megapixels, the limit is 100 \(data\.max_megapixels\)"):
        read_image(tmp_path / "a.png", OPTIONS)
    write_png(tmp_path / "b.png", (1200, 1000), 8, 0, [bytes(1200)] * 1000)
    assert read_image(tmp_path / "b.png", ReadOptions(max_megapixels=1.2)).shape == (3, 1000, 1200)
    with pytest.raises(ImageError, match=r"1\.2 megapixels, the limit is 1\.19"):
        read_image(tmp_path / "b.png", ReadOptions(max_megapixels=1.19))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of this process alone is read from /proc")
def test_image_of_169_megapixels_costs_little_and_nothing_is_printed(tmp_path):
    """The peak is VmHWM: ru_maxrss of a child starts at the peak of its parent."""
    row = bytes(13000)
    write_png(tmp_path / "bomb.png", (13000, 13000), 8, 0, (row for _ in range(13000)))
    assert (tmp_path / "bomb.png").stat().st_size < 1_000_000
    broken_exif = bytearray(encode("JPEG", exif=orientation_exif(1)))
    broken_exif[broken_exif.find(b"MM\0*") + 9] = 200  # 200 tags where there is one: Pillow warns
    (tmp_path / "exif.jpg").write_bytes(broken_exif)
    too_many = bytearray(encode("TIFF"))
    too_many[too_many.find(b"\x15\x01\x03\0") + 9] = 8  # 2051 samples per pixel: Pillow logs an error
    (tmp_path / "samples.tif").write_bytes(too_many)
    script = f"""
from src.engine.images.reading import ImageError, ReadOptions, read_image
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
before = peak()
try:
    read_image({str(tmp_path / "bomb.png")!r}, ReadOptions(max_megapixels=100))
except ImageError as error:
    print(error)
print(peak() - before)
read_image({str(tmp_path / "exif.jpg")!r}, ReadOptions())
try:
    read_image({str(tmp_path / "samples.tif")!r}, ReadOptions())
except ImageError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    message, grown, refused = done.stdout.splitlines()
    assert refused == "refused"
    assert message.endswith("bomb.png: 169.0 megapixels, the limit is 100 (data.max_megapixels)")
    assert int(grown) < 200
    assert done.stderr == ""  # no DecompressionBombWarning, no "Corrupt EXIF data", no log line


def test_files_that_are_not_there_or_not_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "big.png").write_bytes(encode("PNG"))
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 100)
    for name, cause in {"none.jpg": "no such file", "pipe.jpg": "not a file", "big.png": "the limit is"}.items():
        with pytest.raises(ImageError, match=cause):
            read_image(tmp_path / name, OPTIONS)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image("a\0b.jpg", OPTIONS)


class OneBadFile(Dataset):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_image(self.path, OPTIONS)


def test_error_keeps_its_type_and_path_through_a_loader_worker(tmp_path):
    write_corrupt_images(tmp_path)
    batches = iter(DataLoader(OneBadFile(tmp_path / "truncated.jpg"), num_workers=1))
    with pytest.raises(ImageError, match=r"truncated\.jpg: the file ends too early"):
        next(batches)
    assert list(batches) == []  # ends the worker here; the garbage collector would wait 5 s for it in a later test
