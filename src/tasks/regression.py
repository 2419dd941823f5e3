"""task=regression: one or several numbers per image, such as an age.

The network answers in standard units, (value - mean) / std of the training images, and the loss compares these. Labels in
batches, metrics and answers have the units of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.config import Config
from src.engine.commands.user_command import corrected
from src.engine.images.labelled_images import Label, LabelledImages
from src.engine.images.splits import stratified_split
from src.engine.own import is_own
from src.engine.runs.errors import ExitCode, UserError, data_error
from src.engine.runs.files import write_csv
from src.engine.runs.text import few, plural, printable
from src.engine.steps.task_kind import Loss, TaskKind, own_loss
from src.engine.steps.value_metrics import LARGEST, RegressionErrors, columns_of, number_in, numbers_in, ranks
from src.models.losses import LossOfEachImage

BINS, BIN_SIZE = 10, 20  # the split deals out up to 10 quantiles; of fewer than 20 images the shares would be far off
FEW_VALUES, MANY_IMAGES = 5, 50  # so few different values on so many images may be classes
FAR = 8  # standard deviations from the mean: of a million normal values none is


class Regression(TaskKind):
    """values: mean and std of the training images, a number for each of the names. Both are float32 exactly, as loss,
    metrics and answers compute."""

    table = "values"
    noun = "values"
    in_order = True
    has_probabilities = False

    def label_text(self, cells: Mapping[str, str]) -> str:
        return ";".join(repr(number_in(cell, column)).removesuffix(".0") for column, cell in cells.items())

    def text_of(self, label: float | str, classes: Sequence[str]) -> str:
        return str(label)

    def words(self, texts: Sequence[str]) -> Sequence[str]:
        return []

    def names(self, texts: Sequence[str], columns: Sequence[str] = (), known: Sequence[str] = ()) -> tuple[str, ...]:
        return tuple(known or columns or ("label",))

    def columns(self, names: Sequence[str], given: Sequence[str]) -> Sequence[str]:
        if given and {column.strip().lower() for column in given} != {name.strip().lower() for name in names}:
            raise UserError(
                f"data.label_columns names {few(given)}, but the model estimates {few(names)}",
                why="a column is found by its name",
                fix="name the table's columns as the model does",
                code=ExitCode.DATA,
            )
        return names

    def labels(self, texts: Sequence[str], names: Sequence[str]) -> list[Label]:
        return [numbers_in(text, len(names)) for text in texts]

    def split(
        self, texts: Sequence[str], seed: int, val_fraction: float, test_fraction: float, copies: Sequence[str] | None
    ) -> dict[str, list[int]]:
        quantiles = [quantile for (quantile,) in self.strata(texts)]
        return stratified_split(quantiles, seed, val_fraction, test_fraction, copies)

    def strata(self, texts: Sequence[str]) -> list[tuple[str]]:
        """The quantile of the value; of several, that of the sum of their ranks."""
        columns = zip(*(numbers_in(text, texts[0].count(";") + 1) for text in texts), strict=True)
        rank = ranks(np.sum([ranks(np.array(column)) for column in columns], axis=0))
        bins = max(1, min(BINS, len(texts) // BIN_SIZE))
        return [(f"quantile {place * bins // len(texts)} of {bins}",) for place in rank.tolist()]

    def check(self, images: LabelledImages, where: str) -> None:
        for split in ("train", "val"):
            constant = [name for name, column in columns_of(images, split) if len(set(column)) < 2]
            # A column that is the same in the whole of val counts in no R2.
            if constant if split == "train" else len(constant) == len(images.classes):
                raise data_error(
                    f"the {split} split has no two different values of {few(constant)}",
                    where=printable(where),
                    why=f"it has {plural(len(images.splits[split]), 'image')}; by equal values nothing is learned or chosen",
                    fix="add images with other values, or leave the column out of data.label_columns",
                )
        for name, column in columns_of(images, "train"):
            highest, std = abs(column).max(), column.std()
            # Below `tiny` float32 is less exact, and GPUs take it for 0.
            if max(np.spacing(np.float32(highest)), np.finfo(np.float32).tiny) > 1e-3 * std:
                raise data_error(
                    f"the values of {printable(name)}, up to {highest:g}, are too large or too small for their spread, {std:g}",
                    where=printable(where),
                    why="the network computes with 7 digits (float32), which cannot tell such values apart",
                    fix=f"subtract an offset in the table, such as {np.median(column):g}, or change the unit",
                )

    def counted(self, names: Sequence[str]) -> str:
        return f"with {plural(len(names), 'value')} each"

    def described(self, images: LabelledImages) -> list[str]:
        lines = [
            f"values    {printable(name)}: {min(column):g} to {max(column):g}, mean {column.mean():g}, std {column.std():g}"
            for name, column in columns_of(images, "train")
        ]
        return lines[:6] + ([f"          and {len(lines) - 6} more"] if len(lines) > 6 else [])

    def warning(self, images: LabelledImages) -> str:
        said = []
        for name, column in columns_of(images, "train"):
            number, far = len(set(column)), int((abs(column - column.mean()) > FAR * column.std()).sum())
            if number <= FEW_VALUES and len(column) >= MANY_IMAGES:
                said.append(
                    f"{printable(name)} has only {number} different values: for classes there is task=multiclass."
                )
            if far:
                said.append(f"{printable(name)} of {plural(far, 'image')} is more than {FAR} std from the mean.")
        return " ".join(said[:4])

    def fit(self, images: LabelledImages) -> None:
        columns = [column for _, column in columns_of(images, "train")]
        self.values = {
            "mean": tuple(float(np.float32(column.mean())) for column in columns),
            "std": tuple(float(np.float32(column.std())) for column in columns),
        }

    def check_values(self, names: Sequence[str]) -> None:
        mean, std = self.values.get("mean", ()), self.values.get("std", ())
        if not len(mean) == len(std) == len(names):
            raise ValueError(f"task_values has {len(mean)} mean and {len(std)} std for {plural(len(names), 'name')}")
        if not all(abs(value) <= LARGEST for value in mean) or not all(0 < value <= LARGEST for value in std):
            raise ValueError(f"task_values has a mean or std that is not from 0 to {LARGEST:g}")

    def loss(self, config: Config, names: Sequence[str], labels: Tensor) -> RegressionLoss:
        model, example = config.model, torch.zeros(2, len(names))
        if is_own(model.loss):
            return RegressionLoss(self, own_loss(model.loss, model.loss_options, example, example))
        return RegressionLoss(self, huber if model.loss == "huber" else squared)

    def metrics(self, names: Sequence[str], split: str) -> RegressionErrors:
        return RegressionErrors(self, len(names))

    def standardised(self, labels: Tensor) -> Tensor:
        mean, std = self._mean_and_std(labels.device)
        return (labels - mean) / std

    def predicted(self, logits: Tensor) -> Tensor:
        mean, std = self._mean_and_std(logits.device)
        return logits.float() * std + mean

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _on_device(self.values["mean"], device), _on_device(self.values["std"], device)

    def answers(self, logits: Tensor) -> Tensor:
        return self.predicted(logits)

    def logits_of(self, answers: Tensor) -> Tensor:
        return self.standardised(answers)

    def probabilities(self, logits: Tensor) -> Tensor:
        why = "its answers are numbers; a metric can ask for predicted, labels and logits (in standard units)"
        raise UserError("task=regression has no probabilities", why=why, fix=corrected(remove=["metrics"]))

    def kept(self, logits: Tensor, labels: Tensor) -> Tensor:
        """float32 (B, 2 * names): the true and the predicted value of each name."""
        return torch.stack([labels, self.predicted(logits)], 2).flatten(1)

    def write(self, path: Path, names: Sequence[str], kept: Tensor) -> None:
        header = [f"{which}_{name}" for name in names for which in ("true", "predicted")]
        write_csv(path, header, [self.row(names, row) for row in kept.tolist()])

    def header(self, names: Sequence[str]) -> list[str]:
        """Two columns of predictions.csv have names of their own."""
        return [f"value_{name}" if name in ("path", "error") else name for name in names]

    def row(self, names: Sequence[str], answers: Sequence[float]) -> list[str]:
        return [str(np.float32(value)) for value in answers]  # the digits that float32 needs

    def measured_header(self, names: Sequence[str]) -> list[str]:
        return [f"{which}_{name}" for name in names for which in ("true", "predicted", "error")]

    def measured_row(self, names: Sequence[str], label: str, answers: Sequence[float]) -> list[str]:
        rows = [
            (true, answer, answer - true) for true, answer in zip(numbers_in(label, len(names)), answers, strict=True)
        ]
        return self.row(names, [value for row in rows for value in row])

    def shown(self, names: Sequence[str], row: Sequence[str]) -> tuple[str, str, str]:
        return row[0], row[1] if len(row) > 1 else "", ", ".join(row[2:])

    def purpose(self, names: Sequence[str]) -> str:
        return f"estimates {few(names)} from an image"

    def reading(self, names: Sequence[str]) -> str:
        scales = zip(names, self.values["std"], self.values["mean"], strict=True)
        each = [f"{name} = {std:g} * output {'+' if mean >= 0 else '-'} {abs(mean):g}" for name, std, mean in scales]
        return f"a number in standard units for each value, with the std and mean of the training images: {few(each)}"


@lru_cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied once: each copy to a GPU waits for what it still has to compute."""
    with torch.inference_mode(False):  # validation may be the first to ask, training the next
        return torch.tensor(numbers, device=device)


def squared(outputs: Tensor, values: Tensor) -> Tensor:
    """model.loss=mse"""
    return F.mse_loss(outputs, values, reduction="none").mean(1)


def huber(outputs: Tensor, values: Tensor) -> Tensor:
    """model.loss=huber: beyond one std an error counts as it is, not squared."""
    return F.huber_loss(outputs, values, reduction="none").mean(1)


class RegressionLoss(Loss):
    """each: outputs and values in standard units, (B, names) -> the loss of each image, (B,)."""

    def __init__(self, kind: Regression, each: LossOfEachImage) -> None:
        super().__init__()
        self.kind, self.each = kind, each

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.each(logits.float(), self.kind.standardised(labels)).mean()
