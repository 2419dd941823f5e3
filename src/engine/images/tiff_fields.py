"""The fields of a TIFF's first image, changed in the bytes before Pillow sees them.

Pillow turns white-is-zero for up to 8 bits, passes over it for some deeper kinds and refuses the others; and one broken
field that no pixel depends on can make it give up. TIFF 6.0, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_SUBFILE, _BITS, _PHOTOMETRIC, _SUB_IFDS, _DNG = 254, 258, 262, 330, 50706
_SHORT = 3
# What the pixels depend on: sizes, layout, compression, colours, orientation, and GDAL's no-data value.
_NEEDED = frozenset(
    [
        *range(254, 260), 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320,
        *range(322, 326), 332, 338, 339, 347, *range(512, 522), *range(529, 533), 42113,
    ]
)  # fmt: skip


class _Entry(NamedTuple):
    place: int  # of the entry in the file
    tag: int
    kind: int
    count: int
    value: int  # where it is a SHORT that stands in the entry itself


def is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def without_white_is_zero(data: bytes) -> tuple[bytes, bool]:
    """(the file with its field changed to black-is-zero, whether its values are inverted); only for more than 8 bits."""
    entries = {entry.tag: entry for entry in _entries(data)}
    photometric, bits = entries.get(_PHOTOMETRIC), entries.get(_BITS)
    if photometric is None or photometric.value != 0 or photometric.kind != _SHORT:
        return data, False
    if bits is None or bits.count != 1 or bits.value <= 8:
        return data, False
    order, wide = _order(data), _is_big(data)
    changed = bytearray(data)
    at = photometric.place + (12 if wide else 8)
    changed[at : at + 2] = (1).to_bytes(2, order)
    return bytes(changed), True


def is_camera_raw(data: bytes) -> bool:
    """DNG, NEF, ARW and the like are TIFFs whose first image is a small preview."""
    entries = {entry.tag: entry for entry in _entries(data)}
    return _DNG in entries or (_SUBFILE in entries and _SUB_IFDS in entries and entries[_SUBFILE].value & 1 == 1)


def without_metadata(data: bytes) -> bytes:
    """The file with the fields alone that its first image's pixels depend on."""
    order, wide = _order(data), _is_big(data)
    entries = list(_entries(data))
    if not entries:
        return data
    size, count_bytes = (20, 8) if wide else (12, 2)
    kept = [data[entry.place : entry.place + size] for entry in entries if entry.tag in _NEEDED]
    start = entries[0].place - count_bytes
    directory = len(kept).to_bytes(count_bytes, order) + b"".join(kept) + bytes(8 if wide else 4)
    return data[:start] + directory + data[start + len(directory) :]


def _order(data: bytes) -> str:
    return "little" if data[:2] == b"II" else "big"


def _is_big(data: bytes) -> bool:
    """BigTIFF: offsets and counts of 8 bytes."""
    return data[2:4] in (b"+\0", b"\0+")


def _entries(data: bytes) -> Iterator[_Entry]:
    if not is_tiff(data):
        return
    order, wide = _order(data), _is_big(data)

    def number(place: int, size: int) -> int:
        return int.from_bytes(data[place : place + size], order)

    start = number(8, 8) if wide else number(4, 4)
    size, count_bytes, long = (20, 8, 8) if wide else (12, 2, 4)
    for index in range(min(number(start, count_bytes), 4096)):
        place = start + count_bytes + index * size
        if place + size > len(data):
            return
        kind = number(place + 2, 2)
        value = number(place + 4 + long, 2 if kind == _SHORT else 4)
        yield _Entry(place, number(place, 2), kind, number(place + 4, long), value)
