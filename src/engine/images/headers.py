"""What a file holds beside its pixels, taken out of the bytes of a PNG or a TIFF before Pillow sees them.

Pillow refuses a PNG for a wrong checksum in a text chunk, or for a comment above 1 MB, which every viewer passes over, and
decodes one without looking at the checksums of its pixels. A single broken field that no pixel depends on can make it give
up a TIFF. (PNG specification, 5; TIFF 6.0, section 2)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"
# Ancillary chunks that change what is seen: the transparent colour, and what holds an orientation (EXIF, XMP).
_EXIF_KEYWORDS = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
_TRANSPARENCY_BYTES = {0: 2, 2: 6}  # colour type -> length of tRNS; 3 (palette): up to an entry per colour
_LONGEST_METADATA = 2**20  # bytes; above it no EXIF, and Pillow's limit for text

_SUBFILE, _SUB_IFDS, _DNG = 254, 330, 50706
# What the pixels depend on: sizes, layout, compression, colours, orientation, and GDAL's no-data value.
_NEEDED = frozenset(
    [
        *range(254, 260), 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320,
        *range(322, 326), 332, 338, 339, 347, *range(512, 522), *range(529, 533), 42113,
    ]
)  # fmt: skip


def without_what_pillow_refuses(data: bytes) -> bytes:
    """The file for the first try: a PNG without the ancillary chunks that change nothing, are broken or huge.

    Raises EOFError for a PNG that ends before its last chunk, and ValueError for a wrong checksum in a chunk that the pixels
    need.
    """
    return _png_pixels(data, keep_exif=True) if data.startswith(_PNG) else data


def without_metadata(data: bytes) -> bytes:
    """The file for a second try. In other formats Pillow gets along with broken metadata."""
    if data.startswith(_PNG):
        return _png_pixels(data, keep_exif=False)
    return _tiff_pixels(data) if is_tiff(data) else data


def is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_camera_raw(data: bytes) -> bool:
    """DNG, NEF, ARW and the like are TIFFs whose first image is a small preview."""
    fields = {field.tag: field for field in _Directory(data).fields()} if is_tiff(data) else {}
    return _DNG in fields or (_SUBFILE in fields and _SUB_IFDS in fields and fields[_SUBFILE].value & 1 == 1)


def _png_pixels(data: bytes, keep_exif: bool) -> bytes:
    view, place = memoryview(data), len(_PNG)
    kept: list[bytes | memoryview] = [_PNG]
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
        critical = not kind[0] & 0x20  # an upper-case name
        if critical and not crc_is_right:
            raise ValueError(f"broken PNG: wrong checksum in chunk {kind.decode('latin-1')!r}")
        if critical or (crc_is_right and _affects_pixels(kind, content, colour_type, keep_exif)):
            kept.append(view[place:end])
        place = end
        if kind == b"IEND":
            return b"".join(kept)


def _affects_pixels(kind: bytes, content: memoryview, colour_type: int, keep_exif: bool) -> bool:
    if kind == b"tRNS":
        return len(content) == _TRANSPARENCY_BYTES.get(colour_type, len(content))
    if not keep_exif or len(content) > _LONGEST_METADATA:
        return False
    return kind == b"eXIf" or (kind in (b"tEXt", b"zTXt", b"iTXt") and bytes(content[:22]).startswith(_EXIF_KEYWORDS))


class _Field(NamedTuple):
    tag: int
    value: int  # where it stands in the field itself
    content: bytes


class _Directory:
    """The fields of a TIFF's first image."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
        big_tiff = b"+" in data[2:4]  # offsets and counts of 8 bytes
        self.field_bytes, self.count_bytes, self.offset_bytes = (20, 8, 8) if big_tiff else (12, 2, 4)
        self.start = self._number(8 if big_tiff else 4, self.offset_bytes)

    def _number(self, place: int, size: int) -> int:
        return int.from_bytes(self.data[place : place + size], self.order)

    def fields(self) -> Iterator[_Field]:
        first = self.start + self.count_bytes
        for index in range(min(self._number(self.start, self.count_bytes), 4096)):
            place = first + index * self.field_bytes
            if place + self.field_bytes > len(self.data):
                return
            is_short = self._number(place + 2, 2) == 3
            value = self._number(place + 4 + self.offset_bytes, 2 if is_short else 4)
            yield _Field(self._number(place, 2), value, self.data[place : place + self.field_bytes])


def _tiff_pixels(data: bytes) -> bytes:
    """The file with the fields alone that its first image's pixels depend on."""
    directory = _Directory(data)
    fields = list(directory.fields())
    if not fields:
        return data
    kept = [field.content for field in fields if field.tag in _NEEDED]
    count = len(kept).to_bytes(directory.count_bytes, directory.order)
    changed = count + b"".join(kept) + bytes(directory.offset_bytes)
    return data[: directory.start] + changed + data[directory.start + len(changed) :]
