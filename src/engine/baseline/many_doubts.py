"""Whether labels in doubt (doubts.py) are a sign of wrong labels. Nothing here needs torch."""

from __future__ import annotations

MANY = 0.02  # share of all images; confident learning doubts one in a hundred labels of a clean set
GOOD = 0.9  # accuracy of the baseline, below which its doubts are mostly its own mistakes


def worth_a_look(images_in_doubt: int, images: int, accuracy: float | None) -> bool:
    """accuracy: of the baseline; None: the task has none."""
    return 0 < images_in_doubt >= MANY * images and (accuracy or 0) >= GOOD
