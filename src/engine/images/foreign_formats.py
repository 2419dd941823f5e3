"""What a file that is no readable image is, by its first bytes, and what to do with it: one table."""

from __future__ import annotations

from collections.abc import Sequence

from src.engine.images import headers

_CONVERT = "convert it to JPEG or PNG"
_HEIC = 'pip install -e ".[heic]", or convert it'
_RAW = "export it as JPEG or TIFF with the camera's program"
_VIDEO = "take its frames out as images, or delete it"
_DELETE = "delete it"
_AGAIN = "copy or download it again"

# (offset, bytes, what it is, what to do): what people have beside their photos. The first that fits counts, so longer
# signatures stand before shorter ones.
_SIGNATURES = (
    *((4, b"ftyp" + brand, "HEIC, of a phone", _HEIC) for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftypcrx", "a camera's RAW (CR3)", _RAW),
    (4, b"ftypavi", "AVIF, but damaged or of a kind that is not read", _AGAIN),
    (4, b"ftypjp2", "JPEG 2000", _CONVERT),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000", _CONVERT),
    *((0, start, "JPEG XL", _CONVERT) for start in (b"\x00\x00\x00\x0cJXL ", b"\xff\x0a")),
    *((4, box, "a video (MP4, MOV)", _VIDEO) for box in (b"ftyp", b"moov", b"mdat", b"wide")),
    (8, b"AVI ", "a video (AVI)", _VIDEO),
    (0, b"\x1aE\xdf\xa3", "a video (MKV, WebM)", _VIDEO),
    (0, b"%PDF", "PDF", "export its pages or images as PNG"),
    (0, b"8BPS", "a Photoshop document (PSD)", _CONVERT),
    (8, b"CR\x02\x00", "a camera's RAW (CR2)", _RAW),
    *((0, start, "a camera's RAW (ORF, RW2, RAF)", _RAW) for start in (b"IIRO", b"IIU\x00", b"FUJIFILMCCD-RAW")),
    (0, b"PK\x03\x04", "a ZIP archive or an office document", "unpack it, or delete it"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it, or delete it"),
    (0, b"\xd0\xcf\x11\xe0", "an office document or Thumbs.db", _DELETE),
    (0, b"\x00\x05\x16\x07", "a macOS companion of another file (._NAME)", _DELETE),
    (0, b"version https://git-lfs", "a Git LFS pointer without its content", "git lfs pull"),
    (128, b"DICM", "DICOM", _CONVERT),
    (0, b"\x93NUMPY", "a numpy array", _CONVERT),
    (0, b"\x00\x00\x01\x00", "a Windows icon (ICO)", _CONVERT),
    (0, b"\xff\xd8\xff", "a JPEG whose header is damaged", _AGAIN),
    (0, b"\x89PNG", "a PNG whose header is damaged", _AGAIN),
    (0, b"GIF8", "a GIF whose header is damaged", _AGAIN),
    (8, b"WEBP", "a WebP whose header is damaged", _AGAIN),
    (0, b"BM", "a BMP of a kind that is not read, or damaged", _CONVERT),
)
_WEB_PAGE = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<!--")


def not_an_image(data: bytes, formats: Sequence[str]) -> str:
    """Why a file is not read. formats: those that are."""
    unknown = "bytes of an unknown kind", f"{', '.join(formats)} are read"
    kind, advice = describe(data, "HEIF" in formats) or unknown
    return f"not an image of a format that is read, but {kind}: {advice}"


def describe(data: bytes, reads_heic: bool = False) -> tuple[str, str] | None:
    """(what the file is, what to do with it), or None for bytes that say nothing."""
    if headers.is_camera_raw(data):
        return "a camera's RAW (DNG, NEF, ARW)", _RAW
    for offset, signature, kind, advice in _SIGNATURES:
        if data.startswith(signature, offset):
            if advice == _HEIC and reads_heic:
                return "HEIC, but damaged or of a kind that is not read", _AGAIN
            return kind, advice
    if headers.is_tiff(data):
        return "a TIFF of a kind that is not read, or damaged", _CONVERT
    start = data[:4096]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16
        start = start.replace(b"\0", b"")[2:]
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in start:
        return "an SVG drawing", _CONVERT
    if start.startswith(_WEB_PAGE):
        return "a web page (HTML): its download failed", _AGAIN
    if not data.strip(b"\0"):
        return "nothing but zero bytes: its copy failed", _AGAIN
    if start and all(byte >= 32 or byte in b"\t\r\n\f" for byte in start):
        return "a text", _DELETE
    return None
