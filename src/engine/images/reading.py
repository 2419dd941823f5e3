"""Decoding one image file to 8-bit RGB, the same way whatever the file holds, or ImageError.

The datasets call `read_image`; src/engine/images/checking.py calls `read_bytes` and `decode_image`, so that one read of
the file serves both its digest and its decode. Upright after EXIF, first frame, transparency laid on a background
colour, more than 8 bits a channel scaled to 8 (src/engine/images/wide_pixels.py), large images halved
(ReadOptions.keep_side). What a file holds beside its pixels is no reason to refuse it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from src.engine.images import foreign_formats, headers, quick_jpeg, wide_pixels
from src.engine.images.formats import FORMATS
from src.engine.images.strips import budget, strips
from src.engine.images.wide_pixels import Findings
from src.engine.runs.text import printable
from src.engine.weights.preprocessing import ReadOptions

MAX_FILE_BYTES = 512 * 2**20
MOST_BYTES = 2**30  # that decoding and conversion of one image take
_LARGE = 25_000_000  # pixels
_BITS_PER_SAMPLE, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 258, 278, 322, 323  # TIFF 6.0

# ReadOptions.max_megapixels replaces Pillow's own limit, which warns or raises at sizes nobody chose.
Image.MAX_IMAGE_PIXELS = None
# Pillow's warnings and log lines do not name the file. Set once: warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

_UPRIGHT = {  # EXIF orientation -> what makes the image upright (TIFF 6.0, tag 274)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoded:
    """image: upright, mode RGB. findings: what is odd about the image. size: width and height before it was made smaller."""

    image: Image.Image
    findings: Findings
    size: tuple[int, int]


EMPTY_ALPHA = "empty alpha"


class ImageError(Exception):
    """An image that cannot be read; the one argument is 'path: cause', one line.

    One argument only, since torch raises a loader worker's exception again as type(error)(text).
    """


def read_image(path: str | Path, options: ReadOptions) -> torch.Tensor:
    """Reads the file into a tensor (3, H, W) uint8. Raises ImageError."""
    return read_with_findings(path, options)[0].contiguous()


def read_with_findings(path: str | Path, options: ReadOptions) -> tuple[torch.Tensor, Findings]:
    """As read_image, with what was noticed in the file. Raises ImageError."""
    return pixels_of(read_bytes(path, str(path)), str(path), options)


def pixels_of(data: bytes, name: str, options: ReadOptions) -> tuple[torch.Tensor, Findings]:
    """As read_with_findings, of the bytes of a file that messages call `name`.

    The tensor's memory is (H, W, 3), as Pillow has it: torch makes it smaller from that two to three times as quickly as from
    three planes, to the same bit.
    """
    if (pixels := quick_jpeg.decode(data, options, _open)) is not None:
        return pixels, Findings()
    decoded = decode_image(data, name, options)
    return pixel_rows(decoded.image).permute(2, 0, 1), decoded.findings


def pixel_rows(image: Image.Image) -> torch.Tensor:
    """uint8 (H, W, 3) of an image of mode RGB."""
    rows = torch.empty(image.height, image.width, 3, dtype=torch.uint8)
    for (_, top, _, bottom), strip in strips(image):
        if strip is image:  # not large
            return torch.from_numpy(np.array(image))
        rows[top:bottom] = torch.from_numpy(np.array(strip))
    return rows


def encoded(image: Image.Image) -> bytes:
    """A PIL image as the bytes of a file, without loss, so that it is read by the same rules as one."""
    upright, buffer = ImageOps.exif_transpose(image), io.BytesIO()
    upright.save(buffer, "TIFF" if image.mode in ("CMYK", "F", "HSV", "LAB", "YCbCr") else "PNG")
    return buffer.getvalue()


def read_bytes(path: str | Path, name: str) -> bytes:
    """The content of the file. Raises ImageError, which calls the file `name`."""
    try:
        path = Path(path)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise ImageError(f"{printable(name)}: not a file")
        if status.st_size > MAX_FILE_BYTES:
            size, limit = status.st_size / 2**20, MAX_FILE_BYTES // 2**20
            raise ImageError(f"{printable(name)}: a file of {size:.0f} MiB, the limit is {limit} MiB")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{printable(name)}: no such file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{printable(name)}: the file cannot be read ({reason})") from error


def decode_image(data: bytes, name: str, options: ReadOptions) -> Decoded:
    """Decodes the bytes of a file. Raises ImageError, which calls the file `name`."""
    if not data:
        raise ImageError(f"{printable(name)}: empty file")
    try:
        return _decode(data, options)
    except _Refused as error:
        raise ImageError(f"{printable(name)}: {error}") from error
    except Exception as error:  # Pillow lets anything out of a damaged file, from struct.error to AssertionError
        if not isinstance(error, MemoryError):
            with contextlib.suppress(Exception):  # the first error is the one to tell
                bare = headers.without_metadata(data)
                if bare != data:
                    return _decode(bare, options)
        raise ImageError(f"{printable(name)}: {_reason(error, data)}") from error


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any Pillow image as mode RGB, 8 bits a channel; transparency is laid on the background colour."""
    if image.mode in wide_pixels.GREY_MODES:
        image = wide_pixels.grey_to_eight_bits(image, ReadOptions().bits, Findings())
    return _to_rgb(image, background, Findings())


def _to_rgb(image: Image.Image, background: tuple[int, int, int], findings: Findings) -> Image.Image:
    see_through = image.has_transparency_data
    if image.mode == "RGB" and not see_through:
        return image
    if see_through and not any(_with_alpha(strip).getchannel("A").getextrema()[1] for _, strip in strips(image)):
        findings.notes.add(EMPTY_ALPHA)  # a channel that was never filled: nothing would be left of the image
        see_through = False
    canvas = Image.new("RGB", image.size, background)
    for box, strip in strips(image):
        if image.has_transparency_data:
            strip = _with_alpha(strip)
        canvas.paste(strip if see_through else strip.convert("RGB"), box, strip if see_through else None)
    return canvas


def _with_alpha(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _refuse_huge_strip(image: ImageFile.ImageFile, images: int) -> None:
    """libtiff decompresses a strip or a tile as a whole, beside so many images of 4 bytes a pixel."""
    if not image.tile or image.tile[0].codec_name != "libtiff":
        return
    tags, pixels = image.tag_v2, image.width * image.height
    across, down = (tags.get(key, 0) for key in (_TILE_WIDTH, _TILE_LENGTH))
    of_strip = across * down or image.width * min(tags.get(_ROWS_PER_STRIP, image.height), image.height)
    strip_bytes = of_strip * sum(tags.get(_BITS_PER_SAMPLE, (8,))) // 8
    if 4 * pixels * images + strip_bytes > MOST_BYTES:
        raise _Refused(
            f"its pixels lie in strips of {strip_bytes / 2**20:.0f} MiB: save it with smaller ones, or tiled"
        )


def _large_webp(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Pillow takes 16 bytes a pixel; torchvision has the same decoder, takes 7, and reads no animation."""
    from torchvision.io import decode_webp  # takes a second to import

    if getattr(image, "n_frames", 1) > 1:
        raise _Refused("a large animated WebP takes more than 1 GiB to decode: save its first image")
    file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels = Image.fromarray(decode_webp(file).permute(1, 2, 0).numpy())
    pixels.info = image.info  # with its orientation
    return pixels


class _Refused(Exception):
    """A file that could be decoded, and is not; the argument says why."""


def _decode(data: bytes, options: ReadOptions) -> Decoded:
    findings = Findings()
    if headers.is_camera_raw(data):
        raise _Refused(foreign_formats.not_an_image(data, FORMATS))
    data = headers.without_what_pillow_refuses(data)
    image = _open(data)
    megapixels = image.width * image.height / 1e6
    if megapixels > options.max_megapixels:
        limit = f"the limit is {options.max_megapixels:g} (data.max_megapixels)"
        raise _Refused(f"{megapixels:.1f} megapixels, {limit}")
    whole, shrink = image.size, options.shrink_of(*image.size)
    if shrink > 1 and isinstance(image, JpegImageFile):  # its decoder then computes fewer pixels
        image.draft(None, (whole[0] // shrink, whole[1] // shrink))
    drafted = image.size
    with budget.reserved(drafted[0] * drafted[1] / 1e6):
        rgb = _rgb(image, data, options, findings)
    if shrink == 1:
        return Decoded(rgb, findings, rgb.size)
    size = whole if rgb.size == drafted else (whole[1], whole[0])
    rest = shrink // round(whole[0] / drafted[0])
    return Decoded(rgb.reduce(rest) if rest > 1 else rgb, findings, size)


def _rgb(image: ImageFile.ImageFile, data: bytes, options: ReadOptions, findings: Findings) -> Image.Image:
    """Decodes and converts. At no time there are more than two images of 4 bytes a pixel."""
    sixteen_bits = wide_pixels.sixteen_bit_layout(image)
    _refuse_huge_strip(image, 2 if sixteen_bits else 1)
    _scale_transparent_colour(image)
    premultiplied = "RGBa" in (sixteen_bits, *map(wide_pixels.rawmode_of, image.tile[:1]))
    pixels: Image.Image = image
    if sixteen_bits:
        pixels = wide_pixels.colour_to_eight_bits(image, lambda: _open(data), options.bits, findings)
    elif premultiplied:  # Pillow would drop the colours where alpha is 0
        wide_pixels.decoded_as(image, lambda _: "RGBA")
    elif image.format == "WEBP" and image.width * image.height > _LARGE:
        pixels = _large_webp(image, data)
    else:
        image.load()
    turn = _turn(pixels)
    if premultiplied:
        straight, pixels = pixels, Image.new("RGBa", pixels.size)
        for box, strip in strips(straight):
            pixels.paste(Image.frombytes("RGBa", strip.size, strip.tobytes()), box)
        del straight
    elif pixels.mode in wide_pixels.GREY_MODES:
        pixels = wide_pixels.grey_to_eight_bits(pixels, options.bits, findings)
        image.close()
    del image
    rgb = _to_rgb(pixels, options.background, findings)
    del pixels
    return rgb if turn is None else rgb.transpose(turn)


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads the header only. Another library may have told Pillow to fill up truncated files; not here."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    wide_pixels.correct_layout(image)
    return image


def _scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Before loading: Pillow brings the pixels of a PNG to 8 bits, but not the colour that tRNS names transparent."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None or not image.tile:
        return
    layout = image.tile[0].args
    if layout == "L;2" and colour < 4:
        image.info["transparency"] = colour * 85
    elif layout == "L;4" and colour < 16:
        image.info["transparency"] = colour * 17
    elif layout == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a loaded image upright, as its EXIF orientation says; EXIF that cannot be read says nothing.

    ImageOps.exif_transpose would also write the EXIF again, which fails for tags it cannot encode. TIFFs come upright
    from load().
    """
    try:
        return _UPRIGHT.get(image.getexif().get(274))
    except Exception:  # the pixels are whole; as many kinds of exception as in decoding
        return None


def _reason(error: Exception, data: bytes) -> str:
    """Why Pillow gave up, in plain words."""
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        return foreign_formats.not_an_image(data, FORMATS)
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, EOFError) or "truncated" in text.lower() or "EOF" in text:
        return "the file ends too early (truncated)"
    return f"cannot be decoded ({type(error).__name__}: {text[:100]})"
