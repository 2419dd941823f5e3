"""PNG chunks beside the pixels do not decide whether a file is read; the pixels must have the right checksums.

Pillow refuses a PNG for a wrong checksum in a text chunk, or for a comment above 1 MB, which every viewer passes over,
and decodes one without looking at the checksums of its pixels. `pixels_only` mends both before Pillow sees the bytes.
"""

from __future__ import annotations

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Ancillary chunks that change what is seen: the transparent colour, and what holds an orientation (EXIF, XMP).
_EXIF_KEYWORDS = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
_TRANSPARENCY_BYTES = {0: 2, 2: 6}  # colour type -> length of tRNS; 3 (palette): up to an entry per colour
_LONGEST_METADATA = 2**20  # bytes; above it no EXIF, and Pillow's limit for text


def pixels_only(data: bytes, keep_metadata: bool = True) -> bytes:
    """The PNG without the ancillary chunks that change nothing, are broken or huge.

    keep_metadata: EXIF and XMP stay. Raises EOFError for a file that ends before its last chunk, and ValueError for a
    wrong checksum in a chunk that the pixels need (an upper-case name: PNG specification, 5.4).
    """
    view, kept, place = memoryview(data), [SIGNATURE], len(SIGNATURE)
    colour_type = data[25] if len(data) > 25 else 0
    while True:
        if place + 12 > len(data):
            raise EOFError("no IEND chunk")
        length, kind = int.from_bytes(view[place : place + 4]), bytes(view[place + 4 : place + 8])
        end = place + 12 + length
        if end > len(data):
            raise EOFError(f"the chunk {kind!r} ends too early")
        content = view[place + 8 : end - 4]
        crc_is_right = zlib.crc32(view[place + 4 : end - 4]) == int.from_bytes(view[end - 4 : end])
        critical = not kind[0] & 0x20
        if critical and not crc_is_right:
            raise ValueError(f"broken PNG: wrong checksum in chunk {kind.decode('latin-1')!r}")
        if critical or (crc_is_right and _affects_pixels(kind, content, colour_type, keep_metadata)):
            kept.append(view[place:end])
        place = end
        if kind == b"IEND":
            return b"".join(kept)


def _affects_pixels(kind: bytes, content: memoryview, colour_type: int, keep_metadata: bool) -> bool:
    if kind == b"tRNS":
        return len(content) == _TRANSPARENCY_BYTES.get(colour_type, len(content))
    if not keep_metadata or len(content) > _LONGEST_METADATA:
        return False
    return kind == b"eXIf" or (kind in (b"tEXt", b"zTXt", b"iTXt") and bytes(content[:22]).startswith(_EXIF_KEYWORDS))
