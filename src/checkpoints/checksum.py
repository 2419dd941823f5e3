"""A checkpoint file that knows whether it is whole: the CRC-32 of all its bytes, in the comment of the zip archive.

torch.save writes a zip archive with a CRC of every tensor, which torch.load does not look at, and which does not cover the
archive's index: a wrong byte there can load as other numbers without an error. A comment at the end of a zip file is
part of the format, so every reader of torch checkpoints takes the file.
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
    """torch.save into a file that is open for writing at its start."""
    counting = _Counting(file)
    torch.save(value, counting)
    file.seek(-len(NO_COMMENT), 2)
    file.write(struct.pack("<H", LENGTH) + COMMENT % counting.crc)


def damage(path: Path) -> str | None:
    """What is wrong with a file that save_with_checksum wrote, or None."""
    try:
        left, crc = path.stat().st_size - LENGTH - len(NO_COMMENT), 0
        with path.open("rb") as file:
            while left > 0:
                block = file.read(min(BLOCK, left))
                crc, left = zlib.crc32(block, crc), left - len(block)
            end = file.read()
    except OSError as error:
        return f"{error.strerror}"
    whole = struct.pack("<H", LENGTH) + COMMENT % zlib.crc32(NO_COMMENT, crc)
    return None if end == whole else "its CRC-32 is not the one it was written with"


class _Counting:
    """What torch.save needs of a file, with the CRC of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc = file, 0

    def write(self, content: Any) -> int:
        self.crc = zlib.crc32(content, self.crc)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()
