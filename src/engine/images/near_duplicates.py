"""Near-duplicates: images that look the same and are other bytes, such as a photo that was saved again, made smaller or cropped
by a few percent, or two frames of a video.

The check takes a hash of each image that it decodes (`look_of`), and keeps it in its memory. It is a dHash (a
"difference hash": where a small grey copy becomes lighter or darker from field to field) of 256 bits that leaves out steps too
small to survive a JPEG. So plain areas count for nothing, and two drawings on white paper are not alike for the paper's sake.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from src.engine.images.labelled_images import LabelledImages
from src.engine.runs.files import write_csv
from src.engine.runs.text import plural, printable

FIELDS = 9  # of the grey copy's side: 8 steps in each direction
STEP = 3  # of 255: a smaller step between two fields may be gone in a copy
FEWEST = 12  # steps; an image with fewer is too plain to be told from others
ALIKE = 0.8  # share of the steps of two images that both have; at least, for near-duplicates
SAMPLE = 500  # images whose pairs say how much alike any two images of the set are
BLOCK = 64  # rows that are compared at a time: they stay in the processor's cache
MOST = 30_000  # images that are compared unasked: the time grows with the square, to some seconds

log = logging.getLogger(__name__)


def look_of(image: Image.Image) -> str:
    """The hash of an RGB image: 64 hex digits; empty where the image is too plain."""
    small = image.resize((FIELDS, FIELDS), Image.Resampling.BILINEAR, reducing_gap=4.0).convert("L")
    grey = np.asarray(small, dtype=np.int16)
    steps = np.concatenate([np.diff(grey[:-1], axis=1).ravel(), np.diff(grey[:, :-1], axis=0).ravel()])
    bits = np.concatenate([steps > STEP, steps < -STEP])
    return np.packbits(bits).tobytes().hex() if bits.sum() >= FEWEST else ""


def near_pairs(looks: Sequence[str]) -> list[tuple[int, int]]:
    """The near-duplicates among images with these hashes, as pairs of rising places.

    Where any two images of the set are much alike, such as digits, more is asked of a pair: it must be four times closer to
    being the same than 95 % of all pairs are.
    """
    places = np.array([place for place, look in enumerate(looks) if look], dtype=np.int64)
    if len(places) < 2:
        return []
    bits = np.frombuffer(bytes.fromhex("".join(looks)), dtype=np.uint64).reshape(len(places), -1)
    sample = bits[np.linspace(0, len(bits) - 1, min(SAMPLE, len(bits))).astype(int)]
    usual = np.quantile(_similarity(sample, sample)[np.triu_indices(len(sample), 1)], 0.95)
    least = max(ALIKE, 1 - (1 - usual) / 4)
    counts = np.bitwise_count(bits).sum(1, dtype=np.int64)
    order = np.argsort(counts, kind="stable")  # the counts of two images that are alike differ little
    bits, counts, places = bits[order], counts[order], places[order]
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(bits), BLOCK):
        rows = slice(start, start + BLOCK)
        end = np.searchsorted(counts, counts[rows][-1] / least, side="right")
        first, second = np.nonzero(_similarity(bits[rows], bits[start:end]) >= least)
        for one, other in zip(places[rows][first].tolist(), places[start:end][second].tolist(), strict=True):
            if one != other:
                pairs.append((min(one, other), max(one, other)))
    return sorted(set(pairs))


def near_groups(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """The group of each image: the name of the first image of its chain of near-duplicates."""
    first = list(range(len(names)))
    for one, other in sorted(pairs):  # of a chain the first image comes first
        low, high = sorted((_root(first, one), _root(first, other)))
        first[high] = low
    return [names[_root(first, place)] for place in range(len(names))]


def _root(first: list[int], place: int) -> int:
    while first[place] != place:
        place = first[place]
    return place


def report(images: LabelledImages, pairs: Sequence[tuple[str, str]], list_file: Path, is_given: bool) -> None:
    """Says how many near-duplicates there are, and lists them. pairs: of names. is_given: whether the splits were given, and
    not made by the run."""
    header, table = images.table()
    row_of = {row[0]: dict(zip(header, row, strict=True)) for row in table}
    found = [(row_of[name], row_of[other]) for name, other in pairs if name in row_of and other in row_of]
    rows = [
        [one["path"], other["path"], one["split"], other["split"], one["label"], other["label"]]
        for one, other in found
        if one["digest"] != other["digest"]  # what is equal byte for byte is said elsewhere
    ]
    if not rows:
        return
    try:
        write_csv(list_file, ["path", "other", "split", "other split", "label", "other label"], rows)
        listed = f"; {list_file} lists them"
    except OSError as error:
        listed = f"; the list cannot be written: {error}"
    labels = sum(row[4] != row[5] for row in rows)
    two = f", {labels} of them with two labels" if labels else ""
    log.info(f"near      {plural(len(rows), 'pair')} of images look the same, in files that differ{two}{listed}")
    if torn := [row for row in rows if row[2] != row[3]]:
        name, other, split, other_split = map(printable, torn[0][:4])
        mend = "Keep the images of one split" if is_given else "data.group=near_duplicates keeps them together"
        log.warning(
            f"{plural(len(torn), 'pair')} of near-duplicates {'is' if len(torn) == 1 else 'are'} in two splits, such as {name} "
            f"({split}) and {other} ({other_split}): the numbers are too good. {mend}."
        )


def _similarity(bits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Jaccard's: how many steps two images share, of those that at least one has. uint64 (N, 4), (M, 4) -> (N, M)."""
    both = np.zeros((len(bits), len(others)), dtype=np.uint16)
    for word in range(bits.shape[1]):
        both += np.bitwise_count(bits[:, word, None] & others[None, :, word])
    counts, other_counts = (np.bitwise_count(each).sum(1, dtype=np.float32) for each in (bits, others))
    return both / (counts[:, None] + other_counts[None] - both)
