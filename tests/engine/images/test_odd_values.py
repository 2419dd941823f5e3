"""Images whose values would change in silence while they are read, and files that are more than their pixels."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from src.engine.images import foreign_formats
from src.engine.images.reading import EMPTY_ALPHA, Decoded, ImageError, ReadOptions, decode_image
from src.engine.images.wide_pixels import NO_DATA, OWN_RANGE, PLANES, WHITE_IS_ZERO
from tests.engine.images.odd_images import HEIGHT, WIDTH, colour_ramp, orientation_exif, write_png
from tests.engine.images.tiff_files import tiff

TWELVE = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 4095 // (HEIGHT * WIDTH - 1)).astype(np.uint16)
TWELVE_RGB = np.dstack([TWELVE, TWELVE[::-1], TWELVE // 2])
# pytest puts its own warning filters over the one that reading.py sets.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
UNUSED = np.zeros((HEIGHT, WIDTH), np.uint16)


def decode(data: bytes, **options) -> Decoded:
    return decode_image(data, "x", ReadOptions(**options))


def pixels(data: bytes, **options) -> np.ndarray:
    return np.asarray(decode(data, **options).image).astype(int)


def levels(values: np.ndarray, top: float) -> np.ndarray:
    """(H, W, 3): 0..top as 0..255."""
    grey = np.rint(values.astype(float) * 255 / top).astype(int)
    return grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, axis=2)


def encoded(image: Image.Image, form: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def png16(tmp_path: Path, values: np.ndarray, colour_type: int, chunks=()) -> bytes:
    rows = [row.astype(">u2").tobytes() for row in values]
    write_png(tmp_path / "a.png", (WIDTH, HEIGHT), 16, colour_type, rows, chunks)
    return (tmp_path / "a.png").read_bytes()


# --- alpha -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"] + ["AVIF"] * features.check("avif"))
def test_alpha_that_is_zero_everywhere_means_no_alpha(form):
    colour = np.dstack([colour_ramp(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    settings = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 95, "subsampling": "4:4:4"}}.get(
        form, {}
    )
    read = decode(encoded(Image.fromarray(colour), form, **settings))
    assert np.abs(np.asarray(read.image).astype(int) - colour_ramp()).max() <= (10 if form == "AVIF" else 0)
    assert read.findings.notes == {EMPTY_ALPHA}


def test_alpha_that_is_zero_everywhere_in_other_modes(tmp_path):
    grey = colour_ramp()[..., 0]
    empty = np.zeros_like(grey)
    la = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(empty)))
    assert (pixels(encoded(la, "PNG")) == levels(grey, 255)).all()
    palette = Image.fromarray(colour_ramp()).quantize(8)
    shown = np.asarray(palette.convert("RGB"))
    assert (pixels(encoded(palette, "PNG", transparency=bytes(8))) == shown).all()
    assert (pixels(png16(tmp_path, np.dstack([TWELVE * 16, UNUSED]), 4)) == levels(TWELVE >> 4, 255)).all()
    premultiplied = np.dstack([colour_ramp(), empty])
    assert (pixels(tiff(premultiplied, 2, extra={338: (3, struct.pack("<H", 1))})) == colour_ramp()).all()
    one_opaque = np.dstack([colour_ramp(), empty])
    one_opaque[0, 0, 3] = 255
    assert (pixels(encoded(Image.fromarray(one_opaque), "PNG"))[1:] == 255).all()


# --- more than 8 bits ------------------------------------------------------------------------------------------------


def wide_files(tmp_path: Path) -> dict[str, tuple[bytes, np.ndarray]]:
    alpha = np.full_like(TWELVE, 4095)
    premultiplied, ignored = {338: (3, struct.pack("<H", 1))}, {338: (3, struct.pack("<H", 0))}
    rgba = np.dstack([TWELVE_RGB, alpha])
    return {
        "grey.tif": (encoded(Image.fromarray(TWELVE), "TIFF"), TWELVE),
        "signed.tif": (tiff(TWELVE.astype(np.int16), 1), TWELVE),
        "signed_big.tif": (tiff(TWELVE.astype(np.int16), 1, order=">", compress=True), TWELVE),
        "int32_big.tif": (tiff(TWELVE.astype(np.int32), 1, order=">", compress=True), TWELVE),
        "grey.png": (png16(tmp_path, TWELVE, 0), TWELVE),
        "grey_alpha.png": (png16(tmp_path, np.dstack([TWELVE, alpha]), 4), TWELVE),
        "rgb.png": (png16(tmp_path, TWELVE_RGB, 2), TWELVE_RGB),
        "rgba.png": (png16(tmp_path, rgba, 6), TWELVE_RGB),
        "full_alpha.png": (png16(tmp_path, np.dstack([TWELVE_RGB, alpha * 16 + 15]), 6), TWELVE_RGB),
        "rgb.tif": (tiff(TWELVE_RGB, 2), TWELVE_RGB),
        "big.tif": (tiff(TWELVE_RGB, 2, order=">"), TWELVE_RGB),
        "deflate.tif": (tiff(TWELVE_RGB, 2, order=">", compress=True), TWELVE_RGB),
        "planes.tif": (tiff(TWELVE_RGB, 2, planes=True), TWELVE_RGB),
        "four_planes.tif": (tiff(rgba, 2, planes=True, extra=ignored), TWELVE_RGB),
        "premultiplied.tif": (tiff(rgba, 2, extra=premultiplied), TWELVE_RGB),
        "grey.pgm": (b"P5 32 24 65535\n" + TWELVE.astype(">u2").tobytes(), TWELVE),
        "rgb.ppm": (b"P6 32 24 65535\n" + TWELVE_RGB.astype(">u2").tobytes(), TWELVE_RGB),
    }


def test_twelve_bits_in_sixteen_keep_their_levels(tmp_path):
    wrong = {}
    for name, (data, values) in wide_files(tmp_path).items():
        read = decode(data, bits=12)
        difference = np.abs(np.asarray(read.image).astype(int) - levels(values, 4095)).max()
        if difference or read.findings.bits != 12 or read.findings.notes:
            wrong[name] = int(difference), read.findings
        assert (pixels(data, bits=0) == levels(values, 4095)).all(), name
    assert wrong == {}


def test_a_image_is_read_by_the_bits_it_is_told_not_by_its_own(tmp_path):
    """Otherwise images of one set would differ in brightness by what they show."""
    for data in (encoded(Image.fromarray(TWELVE // 8), "TIFF"), png16(tmp_path, TWELVE_RGB // 8, 2)):
        assert decode(data, bits=12).findings.bits == 9
        assert pixels(data, bits=12).max() == levels(np.array([[511]]), 4095).max()
    for data in (encoded(Image.fromarray(TWELVE * 16), "TIFF"), png16(tmp_path, TWELVE_RGB * 16, 2)):
        assert decode(data, bits=12).findings.bits == 16
        assert pixels(data, bits=12).max() == 255


def test_compressed_planes_of_which_only_half_the_bits_can_be_had_are_noted():
    for values, notes in ((TWELVE_RGB, {PLANES}), (TWELVE_RGB * 16, set())):
        assert decode(tiff(values, 2, planes=True, compress=True), bits=0).findings.notes == notes


def test_a_maxval_that_says_the_bits_needs_no_guess():
    data = b"P5 32 24 4095\n" + TWELVE.astype(">u2").tobytes()
    assert decode(data, bits=16).findings.bits == 16
    assert np.abs(pixels(data, bits=16) - levels(TWELVE, 4095)).max() == 0


def test_the_transparent_colour_of_twelve_bits(tmp_path):
    colour = TWELVE_RGB.copy()
    colour[3, 4] = 7, 9, 11
    read = pixels(png16(tmp_path, colour, 2, [(b"tRNS", struct.pack(">HHH", 7, 9, 11))]), bits=12)
    assert (read[3, 4] == 255).all()
    assert (np.delete(read.reshape(-1, 3), 3 * WIDTH + 4, axis=0) != 255).any()
    assert np.abs(np.delete((read - levels(colour, 4095)).reshape(-1, 3), 3 * WIDTH + 4, axis=0)).max() == 0


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
def test_white_is_zero_at_every_depth(order, compress, kind):
    values = (TWELVE >> 4 if kind is np.uint8 else TWELVE).astype(kind)
    top = {np.uint8: 255, np.float32: 1.0}.get(kind, 4095)
    values = values / np.float32(4095) if kind is np.float32 else values
    black = pixels(tiff(values, 1, order=order, compress=compress), bits=12)
    white = decode(tiff(values, 0, order=order, compress=compress), bits=12)
    assert (black == levels(values, top)).all()
    assert (np.asarray(white.image) == 255 - black).all()
    assert white.findings.notes == (set() if kind is np.uint8 else {WHITE_IS_ZERO})


# --- no data ---------------------------------------------------------------------------------------------------------

HEIGHTS = np.random.default_rng(0).uniform(100, 900, (HEIGHT, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("missing", [-9999, -999, -32768, -3.4028235e38, 3.4028235e38, 1e20, np.nan, -np.inf])
def test_floats_are_stretched_by_the_values_that_count(missing):
    values = HEIGHTS.copy()
    values[:4] = missing
    read = decode(encoded(Image.fromarray(values), "TIFF"))
    rest = HEIGHTS[4:].astype(float)
    assert (np.asarray(read.image)[4:] == levels(rest - rest.min(), rest.max() - rest.min())).all()
    assert (np.asarray(read.image)[:4] == 0).all()
    assert read.findings.notes == {NO_DATA, OWN_RANGE}


def test_the_no_data_value_of_gdal(tmp_path):
    values = HEIGHTS.copy()
    values[:4] = 5000
    tag = {42113: (2, b"5000\0")}
    rest = HEIGHTS[4:].astype(float)
    assert (pixels(tiff(values, 1, extra=tag))[4:] == levels(rest - rest.min(), rest.max() - rest.min())).all()
    counts = TWELVE.copy()
    counts[:4] = 65535
    read = decode(tiff(counts, 1, extra={42113: (2, b"65535\0")}), bits=12)
    assert (read.findings.bits, read.findings.notes) == (12, {NO_DATA})
    assert (np.asarray(read.image)[4:] == levels(TWELVE, 4095)[4:]).all()
    for no_value in (b"none\0", b"1e999\0", b"-5\0", b"nan\0", b"\0"):
        assert (pixels(tiff(TWELVE, 1, extra={42113: (2, no_value)}), bits=12) == levels(TWELVE, 4095)).all()


def test_a_low_value_among_others_is_no_sentinel():
    values = np.linspace(-2000, 900, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.float32)
    values[0, 0] = -9999
    values[0, 1] = -6000
    assert decode(encoded(Image.fromarray(values), "TIFF")).findings.notes == {OWN_RANGE}


# --- what stands beside the pixels -----------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


HUGE = zlib.compress(b"x" * 2_400_000)
BESIDE = {
    "text": chunk(b"tEXt", b"a\0b", wrong=1),
    "size": chunk(b"pHYs", bytes(9), wrong=1),
    "short size": chunk(b"pHYs", bytes(3)),
    "profile": chunk(b"iCCP", b"a\0\0" + zlib.compress(b"profile"), wrong=1),
    "broken profile": chunk(b"iCCP", b"a\0\0nothing"),
    "huge profile": chunk(b"iCCP", b"a\0\0" + HUGE),
    "exif": chunk(b"eXIf", b"MM\0*", wrong=1),
    "cut exif": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\xff"),
    "huge exif": chunk(b"eXIf", bytes(2_000_000)),
    "packed text": chunk(b"zTXt", b"workflow\0\0" + HUGE),
    "international text": chunk(b"iTXt", b"workflow\0\x01\0\0\0" + HUGE),
    "huge xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + HUGE),
    "many texts": b"".join(chunk(b"zTXt", b"a%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(70)),
    "long text": chunk(b"tEXt", b"a\0" + b"x" * 2_400_000),
    "long XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2_400_000))),
    "gamma": chunk(b"gAMA", b"", wrong=5),
    "transparency": chunk(b"tRNS", b"\0", wrong=5),
    "no transparency": chunk(b"tRNS", b"\0"),
    "unknown": chunk(b"vpAg", bytes(9), wrong=9),
    "animation": chunk(b"acTL", b"\0", wrong=1) + chunk(b"fcTL", b"\0"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_pngs_are_read_whatever_stands_beside_their_pixels(name):
    data = encoded(Image.fromarray(colour_ramp()), "PNG")
    start, end = data.index(b"IDAT") - 4, len(data) - 12
    for place in (start, end):
        assert (pixels(data[:place] + BESIDE[name] + data[place:]) == colour_ramp()).all()
    assert (pixels(data + b"trailing") == colour_ramp()).all()


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"IEND"])
def test_pngs_whose_pixels_are_damaged_are_refused(kind):
    image = Image.fromarray(colour_ramp())
    data = bytearray(encoded(image.quantize(8) if kind == b"PLTE" else image, "PNG"))
    place = data.index(kind)
    data[place + 4 + int.from_bytes(data[place - 4 : place]) + 1] ^= 1
    with pytest.raises(ImageError, match="checksum"):
        decode(bytes(data))


def test_orientation_survives_in_every_place_of_a_png():
    upright = colour_ramp()[::-1, ::-1]
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x xmlns:tiff="t"><d tiff:Orientation="3"/></x>')
    assert (pixels(encoded(Image.fromarray(colour_ramp()), "PNG", pnginfo=text)) == upright).all()
    assert (pixels(encoded(Image.fromarray(colour_ramp()), "PNG", exif=orientation_exif(3))) == upright).all()


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF"])
def test_broken_metadata_of_other_formats(form):
    image, settings = Image.fromarray(colour_ramp()), {"WEBP": {"lossless": True}}.get(form, {})
    whole = encoded(image, form, exif=orientation_exif(1), icc_profile=b"profile" * 9, **settings)
    reference = pixels(whole)
    random = np.random.default_rng(0)
    for mark in (b"profile", b"Exif" if form == "JPEG" else b"EXIF"):
        for _ in range(20 if mark in whole else 0):
            damaged = bytearray(whole)
            for place in random.integers(whole.index(mark) + 8 * (form == "WEBP"), whole.index(mark) + 30, 3):
                damaged[place] = random.integers(256)
            read = pixels(bytes(damaged))
            assert sorted(read.ravel()) == sorted(reference.ravel())
    if form == "JPEG":
        many = b"".join(b"\xff\xe2" + struct.pack(">H", 60_002) + b"ICC_PROFILE\0" + bytes(59_988) for _ in range(60))
        assert (pixels(whole[:2] + many + whole[2:]) == reference).all()
    if form == "TIFF":
        text = {270: (4, struct.pack("<I", 99) * 3), 34665: (2, b"no offset\0"), 700: (3, bytes(10)), 282: (2, b"72\0")}
        assert (pixels(tiff(colour_ramp(), 2, extra=text)) == colour_ramp()).all()
    assert (pixels(whole + b"trailing") == reference).all()


# --- what a file is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom", "CR3"),
        (b"\0\0\0\x18ftypisom\0\0\0\x01", "video"),
        (b"\n <!DOCTYPE HTML><html>", "web page"),
        ("<html>".encode("utf-16"), "web page"),
        (b'<?xml version="1.0"?><svg xmlns="x">', "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\x01", "Photoshop"),
        (b"II*\0\x10\0\0\0CR\x02\0", "CR2"),
        (b"\xff\x0a\x01\x02", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"RIFF\0\0\0\0AVI LIST", "video"),
        (b"\x1aE\xdf\xa3", "video"),
        (b"PK\x03\x04", "ZIP"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"\0\x05\x16\x07\0\x02\0\0", "macOS"),
        (bytes(500), "zero bytes"),
        (b"\x01\x02\x03\xfe", "bytes of an unknown kind"),
        ("naïve text".encode(), "a text"),
    ],
)
def test_the_reason_says_what_the_file_is_and_what_to_do(start, kind):
    with pytest.raises(ImageError, match=f"x: not an image of a format that is read, but .*{kind}.*: .+") as error:
        decode(start)
    assert len(str(error.value)) <= 130
    assert "\n" not in str(error.value)


def test_a_camera_raw_is_not_taken_for_its_preview():
    """DNG, NEF and ARW are TIFFs that begin with a thumbnail."""
    raw = tiff(colour_ramp(), 2, extra={254: (4, struct.pack("<I", 1)), 330: (4, struct.pack("<I", 8))})
    assert foreign_formats.describe(raw)[0] == "a camera's RAW (DNG, NEF, ARW)"
    with pytest.raises(ImageError, match="RAW"):
        decode(raw)
