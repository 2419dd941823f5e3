"""What a file that is no readable picture is, by its first bytes, and what to do with it: one table."""

from __future__ import annotations

from src.data import tiff_fields

_CONVERT = "convert it to JPEG or PNG"
_RAW = "export it as JPEG or TIFF with the camera's program"
_VIDEO = "take its frames out as pictures, or delete it"
_ARCHIVE = "unpack it, or delete it"
_DELETE = "delete it"
_AGAIN = "copy or download it again"

# (offset, bytes, what it is, what to do). The first that fits counts, so longer signatures stand before shorter ones.
_SIGNATURES = (
    *((4, b"ftyp" + brand, "HEIC, a phone's format", _CONVERT) for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftypcrx", "a camera's RAW (CR3)", _RAW),
    (4, b"ftypjp2", "JPEG 2000", _CONVERT),
    *((4, b"ftyp" + brand, "AVIF, but damaged or of a kind that is not read", _AGAIN) for brand in (b"avif", b"avis")),
    *((4, box, "a video (MP4, MOV)", _VIDEO) for box in (b"ftyp", b"moov", b"mdat", b"wide")),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL", _CONVERT),
    (0, b"\xff\x0a", "JPEG XL", _CONVERT),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000", _CONVERT),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000", _CONVERT),
    (0, b"%PDF", "PDF", "export its pages or pictures as PNG"),
    (0, b"%!PS", "PostScript", _CONVERT),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript (EPS)", _CONVERT),
    (0, b"8BPS", "a Photoshop document (PSD)", _CONVERT),
    (0, b"gimp xcf", "a GIMP document (XCF)", _CONVERT),
    (8, b"CR\x02\x00", "a camera's RAW (CR2)", _RAW),
    (0, b"IIRO", "a camera's RAW (ORF)", _RAW),
    (0, b"IIRS", "a camera's RAW (ORF)", _RAW),
    (0, b"MMOR", "a camera's RAW (ORF)", _RAW),
    (0, b"IIU\x00", "a camera's RAW (RW2)", _RAW),
    (0, b"FUJIFILMCCD-RAW", "a camera's RAW (RAF)", _RAW),
    (0, b"FOVb", "a camera's RAW (X3F)", _RAW),
    (8, b"AVI ", "a video (AVI)", _VIDEO),
    (0, b"\x1aE\xdf\xa3", "a video (MKV, WebM)", _VIDEO),
    (0, b"\x00\x00\x01\xba", "a video (MPEG)", _VIDEO),
    (0, b"\x00\x00\x01\xb3", "a video (MPEG)", _VIDEO),
    (0, b"FLV\x01", "a video (FLV)", _VIDEO),
    (0, b"OggS", "a video or sound (Ogg)", _VIDEO),
    (0, b"0&\xb2u\x8ef\xcf\x11", "a video (WMV)", _VIDEO),
    (8, b"WAVE", "a sound", _DELETE),
    (0, b"ID3", "a sound (MP3)", _DELETE),
    (0, b"PK\x03\x04", "a ZIP archive or an office document", _ARCHIVE),
    (0, b"\x1f\x8b", "a gzip archive", _ARCHIVE),
    (0, b"BZh", "a bzip2 archive", _ARCHIVE),
    (0, b"\xfd7zXZ", "an xz archive", _ARCHIVE),
    (0, b"7z\xbc\xaf", "a 7z archive", _ARCHIVE),
    (0, b"Rar!", "a RAR archive", _ARCHIVE),
    (257, b"ustar", "a tar archive", _ARCHIVE),
    (0, b"\xd0\xcf\x11\xe0", "an office document or Thumbs.db", _DELETE),
    (0, b"\x00\x05\x16\x07", "a macOS companion of another file (._NAME)", _DELETE),
    (0, b"\x00\x05\x16\x00", "a macOS companion of another file", _DELETE),
    (0, b"version https://git-lfs", "a Git LFS pointer without its content", "git lfs pull"),
    (0, b"../.git/annex/objects", "a git-annex pointer without its content", "git annex get"),
    (0, b"/annex/objects", "a git-annex pointer without its content", "git annex get"),
    (128, b"DICM", "DICOM", _CONVERT),
    (0, b"\x89HDF", "HDF5", _CONVERT),
    (0, b"\x93NUMPY", "a numpy array", _CONVERT),
    (0, b"SIMPLE  =", "FITS", _CONVERT),
    (0, b"v/1\x01", "OpenEXR", _CONVERT),
    (0, b"#?RADIANCE", "Radiance HDR", _CONVERT),
    (0, b"DDS ", "DDS", _CONVERT),
    (0, b"qoif", "QOI", _CONVERT),
    (0, b"BPG\xfb", "BPG", _CONVERT),
    (0, b"FLIF", "FLIF", _CONVERT),
    (0, b"AT&TFORM", "DjVu", _CONVERT),
    (0, b"P7\n", "a PAM", _CONVERT),
    (0, b"icns", "a macOS icon", _CONVERT),
    (0, b"\x00\x00\x01\x00", "a Windows icon (ICO)", _CONVERT),
    (0, b"\x00\x00\x02\x00", "a Windows cursor (CUR)", _CONVERT),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile (WMF)", _CONVERT),
    (40, b" EMF", "a Windows metafile (EMF)", _CONVERT),
    (0, b"SQLite format 3", "a database", _DELETE),
    (0, b"\x7fELF", "a program", _DELETE),
    (0, b"MZ", "a program", _DELETE),
    (0, b"\xff\xd8\xff", "a JPEG whose header is damaged", _AGAIN),
    (0, b"\x89PNG", "a PNG whose header is damaged", _AGAIN),
    (0, b"GIF8", "a GIF whose header is damaged", _AGAIN),
    (8, b"WEBP", "a WebP whose header is damaged", _AGAIN),
    *((0, order, "a TIFF of a kind that is not read, or damaged", _CONVERT) for order in (b"II*\0", b"MM\0*")),
    *((0, order, "a BigTIFF of a kind that is not read, or damaged", _CONVERT) for order in (b"II+\0", b"MM\0+")),
    (0, b"BM", "a BMP of a kind that is not read, or damaged", _CONVERT),
)
_WEB_PAGE = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<!--")


def describe(data: bytes) -> tuple[str, str] | None:
    """(what the file is, what to do with it), or None for bytes that say nothing."""
    if tiff_fields.is_camera_raw(data):
        return "a camera's RAW (DNG, NEF, ARW)", _RAW
    for offset, signature, kind, advice in _SIGNATURES:
        if data.startswith(signature, offset):
            return kind, advice
    start = _as_ascii(data[:4096])
    if b"<svg" in start:
        return "an SVG drawing", _CONVERT
    if start.startswith(_WEB_PAGE):
        return "a web page (HTML): its download failed", _AGAIN
    if start.startswith((b"<?xml", b"<")):
        return "an XML or HTML text", _AGAIN
    if start.startswith((b"{", b"[")):
        return "a JSON text", _DELETE
    if not data.strip(b"\0"):
        return "nothing but zero bytes: its copy failed", _AGAIN
    if start and all(byte >= 32 or byte in b"\t\r\n\f" for byte in start):
        return "a text", _DELETE
    return None


def _as_ascii(start: bytes) -> bytes:
    """The beginning of a text in small letters, without a byte order mark, from UTF-8 or UTF-16."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        start = start.replace(b"\0", b"")[2:]
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
