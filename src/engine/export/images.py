"""A few real images to compare outputs on: held-out ones of the run, or those that the user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from src.engine.commands import config_checks
from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected
from src.engine.images.folders import list_images
from src.engine.images.reading import ImageError
from src.engine.images.resizing import eval_transform
from src.engine.images.sources import ImageSources
from src.engine.images.splits import read_split_file
from src.engine.images.time_limit import in_time
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.trained_model import TrainedModel

MOST = 16

Name = TypeVar("Name")


def images_of_run(run: Path, settings: dict[str, Any], model: TrainedModel, sources: ImageSources) -> Tensor:
    """Up to MOST images of the test split, or of val where there is no test: uint8 (N, 3, S, S). settings: the run's. Raises
    UserError."""
    try:
        read = _reader(config_checks.read(settings), model, sources)
        split_of = read_split_file(run / "split.csv")
        held_out = [[name for name, (split, _) in split_of.items() if split == wanted] for wanted in ("test", "val")]
        return _read(held_out[0] or held_out[1], read)
    except (ImageError, UserError) as error:
        raise UserError(
            f"the run's images cannot be read any more: {error}",
            where=f"{run}: config.yaml and split.csv say where they were",
            why="an export is compared on images; they were moved, or the command is given in another folder; "
            "images= takes any folder of images",
            fix=corrected("images=photos/"),
            code=ExitCode.NO_INPUT,
        ) from error


def images_below(images: Path, model: TrainedModel) -> Tensor:
    """Up to MOST images of a folder and its sub-folders, or the one file: uint8 (N, 3, S, S). Raises UserError."""
    files = list_images(images)
    try:
        return _read(files, model.read)
    except ImageError as error:
        raise UserError(
            str(error), where=f"images={images}", fix="remove it, or name other images", code=ExitCode.DATA
        ) from error


def _reader(config: Config, model: TrainedModel, sources: ImageSources) -> Callable[[str], Tensor]:
    """A name of split.csv -> uint8 (3, S, S). Only the images that are asked for are opened."""
    data = config.data
    if sources.lists_files(data, model.kind):
        root = sources.image_root(data, model.kind)
        return lambda name: model.read(root / name)
    images = sources.load_images(data, model.kind, config.seed, cache_dir=Path(config.runs_dir) / ".checked")
    index = {name: index for index, name in enumerate(images.names)}
    transform = eval_transform(model.card.preprocessing)
    return lambda name: transform(images.read(index[name]))


def _read(names: Sequence[Name], read: Callable[[Name], Tensor]) -> Tensor:
    """Images from all over the list, since it is sorted by class."""
    count = min(MOST, len(names))
    return torch.stack(in_time(read, [names[place * len(names) // count] for place in range(count)]))
