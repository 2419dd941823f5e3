"""Checkpoint files that carry the CRC-32 of all their bytes, in the comment at the end of the zip archive.

torch.save writes a zip archive with a CRC of every tensor, but torch.load ignores it, and it does not cover the archive's
index, where a wrong byte can load as other numbers without an error. The comment is part of the zip format, so every
reader of torch checkpoints accepts the file.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

NO_COMMENT = struct.pack("<H", 0)  # a zip file ends with the length of its comment, then the comment
COMMENT = b"crc32 %08x"
LENGTH = len(COMMENT % 0)
BLOCK = 2**20


def save_with_checksum(value: Any, file: BinaryIO) -> None:
    """torch.save into an empty file, followed by the checksum."""
    counting = _Counting(file)
    torch.save(value, counting)
    file.seek(-len(NO_COMMENT), 2)
    file.write(struct.pack("<H", LENGTH) + COMMENT % counting.crc)


def damage(path: Path) -> str | None:
    """Why a file of save_with_checksum cannot be trusted, or None."""
    try:
        left, crc = path.stat().st_size - LENGTH - len(NO_COMMENT), 0
        with path.open("rb") as file:
            while left > 0:
                block = file.read(min(BLOCK, left))
                crc, left = zlib.crc32(block, crc), left - len(block)
            end = file.read()
    except OSError as error:
        return error.strerror or "it cannot be read"
    whole = struct.pack("<H", LENGTH) + COMMENT % zlib.crc32(NO_COMMENT, crc)
    return None if end == whole else "its CRC-32 is not the one it was written with"


class _Counting:
    """The methods of a file that torch.save needs; computes the CRC of the bytes written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc = file, 0

    def write(self, content: Any) -> int:
        self.crc = zlib.crc32(content, self.crc)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()
