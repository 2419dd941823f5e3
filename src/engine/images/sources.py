"""What the engine asks of the module that reads the owner's images: src/data/sources.py."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from src.engine.commands.schema import Data
from src.engine.images.labelled_images import LabelledImages
from src.engine.steps.task_kind import TaskKind


class ImageSources(Protocol):
    """The module itself is one: evaluate and export hand it in."""

    def load_images(
        self,
        data: Data,
        kind: TaskKind,
        seed: int,
        *,
        cache_dir: Path,
        bad_list: Path | None = None,
        run_split: Path | None = None,
    ) -> LabelledImages:
        """The images of the settings, checked and split."""
        ...

    def load_unsplit(self, data: Data, kind: TaskKind, *, cache_dir: Path) -> LabelledImages:
        """Files to evaluate on, as the test split."""
        ...

    def lists_files(self, data: Data, kind: TaskKind) -> bool:
        """Whether the images are files below `image_root`."""
        ...

    def image_root(self, data: Data, kind: TaskKind) -> Path: ...
