"""What is odd about a set of images, said once with counts; found by the check, which decodes all of them anyway.

src/data/sources.py calls `bits_used` to read all images of a set alike, and `report` to say what a user should look at.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

from src.engine.images.reading import EMPTY_ALPHA
from src.engine.images.wide_pixels import NO_DATA, OWN_RANGE, PLANES, WHITE_IS_ZERO
from src.engine.runs.text import printable

if TYPE_CHECKING:
    from src.engine.images.checking import CheckResult

ONE_COLOUR = "one colour"
ICON_PIXELS = 64  # the longer side of an icon is at most this, and at most a quarter of the set's median
FEW_BITS = 4  # an image that uses so many bits less than the set keeps 16 levels of grey or fewer

_MEANINGS = {
    ONE_COLOUR: "show a single colour, such as all black",
    EMPTY_ALPHA: "have an alpha channel that is 0 everywhere, which would hide all of them: it is not applied",
    NO_DATA: "have values that stand for no data (nan, -9999, GDAL's): they become black, the others count",
    OWN_RANGE: "hold floats, negative or 32-bit numbers: each is stretched from its own smallest value to its largest",
    WHITE_IS_ZERO: "are stored with white as zero in more than 8 bits: they are turned round",
}

log = logging.getLogger(__name__)


def bits_used(checked: Mapping[str, CheckResult]) -> int:
    """How many bits the 16-bit channels of the set use, 1 to 16; 16 where no image has such channels."""
    return max((entry.bits for entry in checked.values() if entry.error is None), default=0) or 16


def report(checked: Mapping[str, CheckResult], bits: int) -> None:
    """One warning for each kind of oddity: how many images, and one of them. bits: what they are read with."""
    good = {name: entry for name, entry in checked.items() if entry.error is None}
    for note, meaning in _MEANINGS.items():
        _say([name for name, entry in good.items() if note in entry.notes], len(good), meaning)
    usual = median(max(entry.width, entry.height) for entry in good.values()) if good else 0
    longest = min(ICON_PIXELS, usual / 4)
    icons = [name for name, entry in good.items() if max(entry.width, entry.height) <= longest]
    _say(
        icons, len(good), f"are as small as icons: at most {longest:.0f} pixels high and wide, the usual is {usual:.0f}"
    )

    wide = {name: entry.bits for name, entry in good.items() if entry.bits}
    if bits < 16:
        range_ = f"0 to {2**bits - 1} is read as black to white (data.bits={bits})"
        _say(list(wide), len(good), f"have 16-bit channels: {range_}", logging.INFO)
        planes = [name for name in wide if PLANES in good[name].notes]
        kept = f"only the upper 8 of 16 bits of these are read, which leaves {2 ** max(0, bits - 8)} levels"
        _say(planes, len(good), f"are TIFFs with compressed colour planes: {kept}; save them as PNG, or uncompressed")
    few = {name: own for name, own in wide.items() if own <= bits - FEW_BITS}
    used = max(few.values(), default=0)
    _say(
        list(few),
        len(good),
        f"use at most {used} of the {bits} bits that 16-bit images are read with (data.bits): they are almost black",
    )
    _say(
        [name for name, own in wide.items() if own > bits],
        len(good),
        f"use more than the {bits} bits that 16-bit images are read with (data.bits): what is above is white",
    )


def other_bits(bits: int, read_with: int) -> str | None:
    """The warning about an image of `bits` bits that is read with the bits of the training images; None: it is not needed."""
    if bits > read_with:
        return f"it uses {bits} bits of its 16-bit channels, the training images {read_with}: what is above is white"
    if 0 < bits <= read_with - FEW_BITS:
        return f"it uses {bits} bits of its 16-bit channels, the training images {read_with}: it is almost black"
    return None


def _say(names: list[str], total: int, meaning: str, level: int = logging.WARNING) -> None:
    if names:
        log.log(level, f"{len(names)} of {total} images {meaning}; for example {printable(names[0])}")
