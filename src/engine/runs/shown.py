"""What report.html shows of a run beside the files in its folder: images, and what its network looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from src.engine.commands.schema import Config
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.resizing import Transform
from src.engine.runs.trained_model import TrainedModel
from src.engine.weights.preprocessing import Preprocessing


@dataclass(frozen=True)
class Shown:
    config: Config
    read: Callable[[str], Tensor]  # a path of split.csv -> uint8 (3, H, W); raises ImageError
    preprocessing: Preprocessing
    training: Transform  # what an image goes through in training; it draws from the global generators
    model: TrainedModel | None = None  # None: of a run that has none yet


def read_by_name(images: LabelledImages) -> Callable[[str], Tensor]:
    number = {name: index for index, name in enumerate(images.names)}
    return lambda name: images.read(number[name])
