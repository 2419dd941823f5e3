"""Writes TIFFs of the kinds that Pillow reads but cannot write: any byte order, sample format, planes, photometric."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def tiff(
    pixels: np.ndarray,
    photometric: int,
    *,
    order: str = "<",
    planes: bool = False,
    compress: bool = False,
    extra: dict[int, tuple[int, bytes]] | None = None,
) -> bytes:
    """pixels: (H, W) or (H, W, C) of any integer or float type. order: < or >. extra: tag -> (type, value as bytes)."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, channels = pixels.shape
    stored = pixels.astype(pixels.dtype.newbyteorder(order))
    strips = [stored[..., c].tobytes() for c in range(channels)] if planes else [stored.tobytes()]
    strips = [zlib.compress(strip) for strip in strips] if compress else strips
    strips = [strip + bytes(len(strip) % 2) for strip in strips]
    offsets = [8 + sum(map(len, strips[:index])) for index in range(len(strips))]
    sample_format = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]

    def short(*values: int) -> tuple[int, bytes]:
        return 3, struct.pack(f"{order}{len(values)}H", *values)

    def long(*values: int) -> tuple[int, bytes]:
        return 4, struct.pack(f"{order}{len(values)}I", *values)

    fields = {
        256: long(width),
        257: long(height),
        258: short(*[pixels.dtype.itemsize * 8] * channels),
        259: short(8 if compress else 1),
        262: short(photometric),
        273: long(*offsets),
        277: short(channels),
        278: long(height),
        279: long(*map(len, strips)),
        284: short(2 if planes else 1),
        339: short(*[sample_format] * channels),
        **(extra or {}),
    }
    start = 8 + sum(map(len, strips))
    behind = start + 2 + 12 * len(fields) + 4
    directory, values = struct.pack(f"{order}H", len(fields)), b""
    for tag, (kind, value) in sorted(fields.items()):
        directory += struct.pack(f"{order}HHI", tag, kind, len(value) // {2: 1, 3: 2, 4: 4}[kind])
        if len(value) <= 4:
            directory += value.ljust(4, b"\0")
        else:
            directory += struct.pack(f"{order}I", behind + len(values))
            values += value + bytes(len(value) % 2)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + b"".join(strips) + directory + bytes(4) + values
