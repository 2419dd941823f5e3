"""A file again without what it holds beside its pixels, for a second try: broken EXIF, XMP, ICC or comments."""

from __future__ import annotations

from src.data import png_chunks, tiff_fields

_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")


def without(data: bytes) -> bytes | None:
    """The same picture without metadata, or None where there is none that could be left out."""
    try:
        if data.startswith(png_chunks.SIGNATURE):
            bare = png_chunks.pixels_only(data, keep_metadata=False)
        elif data.startswith(b"\xff\xd8"):
            bare = _bare_jpeg(data)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            bare = _bare_webp(data)
        elif tiff_fields.is_tiff(data):
            bare = tiff_fields.without_metadata(data)
        else:
            return None
    except (ValueError, EOFError, IndexError):  # damaged beyond its metadata
        return None
    return None if bare == data else bare


def _bare_jpeg(data: bytes) -> bytes:
    """Without APPn and comments before the first scan, but for JFIF and Adobe, which say what the colours are."""
    kept, place = [data[:2]], 2
    while data[place] == 0xFF and data[place + 1] != 0xDA:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4])
        if end <= place + 2:
            raise ValueError("a segment without its length")
        if not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def _bare_webp(data: bytes) -> bytes:
    kept, place = [], 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        end = place + 8 + size + size % 2
        kind, chunk = data[place : place + 4], data[place:end]
        if kind == b"VP8X":  # its flags say which of the others there are
            chunk = chunk[:8] + bytes([chunk[8] & ~(0x20 | 0x08 | 0x04)]) + chunk[9:]
        if kind in _WEBP_PIXELS:
            kept.append(chunk)
        place = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body
