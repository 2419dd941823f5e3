"""Decoding one picture file to 8-bit RGB, the same way whatever the file holds, or PictureError.

The datasets call `read_picture`; src/data/checking.py calls `read_bytes` and `decode_picture`, so that one read of the
file serves both its digest and its decode. Upright after EXIF, first frame, transparency laid on a background colour,
more than 8 bits a channel scaled to 8 (src/data/wide_pixels.py). What a file holds beside its pixels is no reason to refuse it.
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
from PIL import Image, ImageFile, UnidentifiedImageError

from src.data import foreign_formats, png_chunks, tiff_fields, wide_pixels
from src.data.wide_pixels import Found
from src.preprocessing import ReadOptions
from src.text import printable

# The file endings that are taken for pictures; what a file really is follows from its content.
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .gif .webp .bmp .tif .tiff .avif .ppm .pgm .pbm .pnm".split()  # noqa: SIM905
)
# Nothing else is opened: an EPS named .jpg must not reach Ghostscript. MPO is read by the JPEG plugin; it is not
# registered under its own name, and naming it here makes Image.open raise KeyError.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM")
MAX_FILE_BYTES = 512 * 2**20

# ReadOptions.max_megapixels replaces Pillow's own limit, which warns or raises at sizes nobody chose.
Image.MAX_IMAGE_PIXELS = None
# Pillow's warnings and log lines do not name the file. Set once: warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

_UPRIGHT = {  # EXIF orientation -> what makes the picture upright (TIFF 6.0, tag 274)
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
    """image: upright, mode RGB. found: what is odd about the picture."""

    image: Image.Image
    found: Found


EMPTY_ALPHA = "empty alpha"


class PictureError(Exception):
    """A picture that cannot be read; the one argument is 'path: cause', one line.

    One argument only, since torch raises a loader worker's exception again as type(error)(text).
    """


def read_picture(path: str | Path, options: ReadOptions) -> torch.Tensor:
    """Reads the file into a tensor (3, H, W) uint8. Raises PictureError."""
    return read_and_look(path, options)[0]


def read_and_look(path: str | Path, options: ReadOptions) -> tuple[torch.Tensor, Found]:
    """As read_picture, with what was noticed in the file. Raises PictureError."""
    decoded = decode_picture(read_bytes(path, str(path)), str(path), options)
    return torch.from_numpy(np.array(decoded.image)).permute(2, 0, 1).contiguous(), decoded.found


def read_bytes(path: str | Path, name: str) -> bytes:
    """The content of the file. Raises PictureError, which calls the file `name`."""
    try:
        path = Path(path)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise PictureError(f"{printable(name)}: not a file")
        if status.st_size > MAX_FILE_BYTES:
            size, limit = status.st_size / 2**20, MAX_FILE_BYTES // 2**20
            raise PictureError(f"{printable(name)}: a file of {size:.0f} MiB, the limit is {limit} MiB")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise PictureError(f"{printable(name)}: no such file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError(f"{printable(name)}: the file cannot be read ({reason})") from error


def decode_picture(data: bytes, name: str, options: ReadOptions) -> Decoded:
    """Decodes the bytes of a file. Raises PictureError, which calls the file `name`."""
    if not data:
        raise PictureError(f"{printable(name)}: empty file")
    try:
        return _decode(data, options)
    except _Refused as error:
        raise PictureError(f"{printable(name)}: {error}") from error
    except Exception as error:  # Pillow lets anything out of a damaged file, from struct.error to AssertionError
        if not isinstance(error, MemoryError):
            with contextlib.suppress(Exception):  # the first error is the one to tell
                bare = _without_metadata(data)
                if bare != data:
                    return _decode(bare, options)
        raise PictureError(f"{printable(name)}: {_reason(error, data)}") from error


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any Pillow image as mode RGB, 8 bits a channel; transparency is laid on the background colour."""
    return _to_rgb(image, ReadOptions(background), False, Found())


def _to_rgb(image: Image.Image, options: ReadOptions, white_is_zero: bool, found: Found) -> Image.Image:
    if image.mode in wide_pixels.GREY_MODES:
        image = wide_pixels.grey_to_eight_bits(image, options.bits, white_is_zero, found)
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[1] > 0:
            canvas = Image.new("RGB", image.size, options.background)
            canvas.paste(image, mask=image)
            return canvas
        found.notes.add(EMPTY_ALPHA)  # a channel that was never filled: nothing would be left of the picture
    return image if image.mode == "RGB" else image.convert("RGB")


class _Refused(Exception):
    """A file that could be decoded, and is not; the argument says why."""


def _decode(data: bytes, options: ReadOptions) -> Decoded:
    found = Found()
    white_is_zero = False
    if data.startswith(png_chunks.SIGNATURE):
        data = png_chunks.pixels_only(data)
    elif tiff_fields.is_tiff(data):
        if tiff_fields.is_camera_raw(data):
            raise _Refused(_not_a_picture(data))
        data, white_is_zero = tiff_fields.without_white_is_zero(data)
    image = _open(data)
    megapixels = image.width * image.height / 1e6
    if megapixels > options.max_megapixels:
        limit = f"the limit is {options.max_megapixels:g} (data.max_megapixels)"
        raise _Refused(f"{megapixels:.1f} megapixels, {limit}")
    _scale_transparent_colour(image)
    if wide_pixels.has_sixteen_bit_colour(image):
        pixels = wide_pixels.colour_to_eight_bits(image, lambda: _open(data), options.bits, found)
    elif (
        image.tile and wide_pixels.rawmode_of(image.tile[0]) == "RGBa"
    ):  # where alpha is 0 Pillow would drop the colour
        colour = wide_pixels.decoded_as(image, lambda _: "RGBA")
        pixels = Image.frombytes("RGBa", image.size, colour.tobytes())
    else:
        image.load()
        pixels = image
    return Decoded(_upright(_to_rgb(pixels, options, white_is_zero, found), image), found)


def _without_metadata(data: bytes) -> bytes:
    """For a second try. In other formats Pillow gets along with broken metadata."""
    if data.startswith(png_chunks.SIGNATURE):
        return png_chunks.pixels_only(data, keep_metadata=False)
    return tiff_fields.without_metadata(data)


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


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    """Turns rgb as the EXIF orientation of the original says; EXIF that cannot be read says nothing.

    ImageOps.exif_transpose would also write the EXIF again, which fails for tags it cannot encode. TIFFs come upright
    from load().
    """
    try:
        method = _UPRIGHT.get(original.getexif().get(274))
    except Exception:  # the pixels are whole; as many kinds of exception as in decoding
        method = None
    return rgb if method is None else rgb.transpose(method)


def _reason(error: Exception, data: bytes) -> str:
    """Why Pillow gave up, in plain words."""
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        return _not_a_picture(data)
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, EOFError) or "truncated" in text.lower() or "EOF" in text:
        return "the file ends too early (truncated)"
    return f"cannot be decoded ({type(error).__name__}: {text[:100]})"


def _not_a_picture(data: bytes) -> str:
    kind, advice = foreign_formats.describe(data) or ("bytes of an unknown kind", f"{', '.join(FORMATS)} are read")
    return f"not a picture of a format that is read, but {kind}: {advice}"
