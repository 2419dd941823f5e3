"""What a model made of each image of a split: its intervals and predictions.csv follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from src.engine.images.labelled_images import LabelledImages
from src.engine.runs.files import write_csv
from src.engine.steps.task_kind import TaskKind


@dataclass(frozen=True)
class Outputs:
    """Of the images that could be read, in the order of the split, on the CPU."""

    logits: Tensor  # float32 (N, outputs)
    labels: Tensor  # int64 (N,) or float32 (N, names)
    members: list[int]  # which images they are

    def groups(self, images: LabelledImages) -> list[str] | None:
        """The group of each, where the data has some."""
        return None if images.groups is None else [images.groups[index] for index in self.members]

    def kept(self, kind: TaskKind) -> Tensor:
        """What the task's table of results is written from."""
        return kind.kept(self.logits, self.labels)


def write_predictions(path: Path, kind: TaskKind, images: LabelledImages, outputs: Outputs) -> None:
    """A CSV with a row per image: its name as in split.csv, its label, what the model says of it, and its group, if any."""
    names, groups, rows = images.classes, outputs.groups(images), []
    for index, answers in zip(outputs.members, kind.answers(outputs.logits).tolist(), strict=True):
        rows.append([images.names[index], *kind.measured_row(names, images.label_text(index), answers)])
    if groups is not None:
        rows = [[*row, group] for row, group in zip(rows, groups, strict=True)]
    write_csv(path, ["path", *kind.measured_header(names), *([] if groups is None else ["group"])], rows)
