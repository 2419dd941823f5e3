"""What data=image_folder and data=table find: files, their class names, and their splits where the data states them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass
class Listing:
    """Image files below a folder: one entry per image, in a fixed order."""

    root: Path
    names: list[str] = field(default_factory=list)  # paths relative to root, with forward slashes
    labels: list[str] = field(default_factory=list)  # class names
    splits: list[str] | None = None  # train, val or test of each image, where the data says so
    source: str = ""  # what messages name; "": root

    def only(self, indices: Sequence[int]) -> Listing:
        """The listing of these images alone."""
        stated = None if self.splits is None else [self.splits[index] for index in indices]
        names, labels = ([values[index] for index in indices] for values in (self.names, self.labels))
        return replace(self, names=names, labels=labels, splits=stated)
