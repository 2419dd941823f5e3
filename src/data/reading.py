"""Decoding one picture file to 8-bit RGB, the same way whatever the file holds, or PictureError.

The datasets call `read_picture`; src/data/checking.py calls `read_bytes` and `decode_picture`, so that one read of the
file serves both its digest and its decode. Upright after EXIF, first frame, transparency laid on a background colour,
16-bit, integer and float grey scaled to 8 bit. Colour of 16 bits per channel keeps its high byte (Pillow's way).
"""

from __future__ import annotations

import io
import logging
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

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

_WIDE_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_SIXTEEN_TO_EIGHT = np.rint(np.arange(65536) / 257).astype(np.uint8)
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
class ReadOptions:
    """background: RGB, 0 to 255, laid under transparent pictures. max_megapixels: larger pictures are refused."""

    background: tuple[int, int, int] = (255, 255, 255)
    max_megapixels: float = 100.0


class PictureError(Exception):
    """A picture that cannot be read; the one argument is 'path: cause', one line.

    One argument only, since torch raises a loader worker's exception again as type(error)(text).
    """


def read_picture(path: str | Path, options: ReadOptions) -> torch.Tensor:
    """Reads the file into a tensor (3, H, W) uint8. Raises PictureError."""
    image = decode_picture(read_bytes(path, str(path)), str(path), options)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_bytes(path: str | Path, name: str) -> bytes:
    """The content of the file. Raises PictureError, which calls the file `name`."""
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise PictureError(f"{printable(name)}: not a file")
        if status.st_size > MAX_FILE_BYTES:
            size, limit = status.st_size / 2**20, MAX_FILE_BYTES // 2**20
            raise PictureError(f"{printable(name)}: a file of {size:.0f} MiB, the limit is {limit} MiB")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise PictureError(f"{printable(name)}: no such file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError(f"{printable(name)}: the file cannot be read ({reason})") from error


def decode_picture(data: bytes, name: str, options: ReadOptions) -> Image.Image:
    """Decodes the bytes of a file into an upright picture of mode RGB. Raises PictureError, which calls it `name`."""
    if not data:
        raise PictureError(f"{printable(name)}: empty file")
    try:
        image = _open(data)
        megapixels = image.width * image.height / 1e6
        if megapixels <= options.max_megapixels:
            if image.format == "PNG":  # its checksums, and that its last chunk is there; Pillow decodes without them
                image.verify()
                image = _open(data)
            _scale_transparent_colour(image)
            image.load()
            return _upright(to_rgb(image, options.background), image)
    except Exception as error:  # Pillow lets anything out of a damaged file, from struct.error to AssertionError
        raise PictureError(f"{printable(name)}: {_reason(error)}") from error
    limit = f"the limit is {options.max_megapixels:g} (data.max_megapixels)"
    raise PictureError(f"{printable(name)}: {megapixels:.1f} megapixels, {limit}")


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any Pillow image as mode RGB, 8 bits a channel; transparency is laid on the background colour."""
    if image.mode in _WIDE_GREY:
        image = _to_eight_bits(image)
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image)
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def printable(name: str) -> str:
    """The name on one line: names with line breaks, or bytes that are not text, are shown with escapes."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads the header only. Another library may have told Pillow to fill up truncated files; not here."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    return Image.open(io.BytesIO(data), formats=FORMATS)


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


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits as mode L, or LA if one grey is transparent.

    0..65535 maps to 0..255. Integers outside of that, and floats outside of 0..1, are stretched from min..max.
    """
    values = np.asarray(image)
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        grey = _SIXTEEN_TO_EIGHT[values]
    else:
        if image.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
        if high > low:
            values = (values - low) * (255 / (high - low))
        grey = np.rint(values.clip(0, 255)).astype(np.uint8)
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    alpha = np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _reason(error: Exception) -> str:
    """Why Pillow gave up, in plain words."""
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture of a format that is read ({', '.join(FORMATS)}), or its header is damaged"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, EOFError) or "truncated" in text.lower() or "EOF" in text:
        return "the file ends too early (truncated)"
    return f"cannot be decoded ({type(error).__name__}: {text[:100]})"
