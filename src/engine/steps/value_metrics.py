"""The metrics of task=regression, and the values of its labels: texts of a table, columns of a split."""

from __future__ import annotations

import math
import re
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from src.engine.images.labelled_images import LabelledImages
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import plural, printable
from src.engine.steps.metrics import PreciseSums

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # float() also takes nan and 1_000
LARGEST = 1e37  # float32, which labels are in a batch, ends at 3e38


class Standardised(Protocol):
    """The task, which knows the mean and the std of the training images."""

    values: dict[str, tuple[float, ...]]

    def standardised(self, labels: Tensor) -> Tensor: ...


class RegressionErrors(PreciseSums):
    """r2, mae and rmse, each the mean over the names. R2 is that of the names whose values differ, nan where none does."""

    def __init__(self, kind: Standardised, num_names: int) -> None:
        super().__init__(5, num_names)
        self.kind = kind

    def update(self, logits: Tensor, labels: Tensor) -> None:
        true = self.kind.standardised(labels)
        error = logits.float() - true
        self.add(torch.stack([torch.ones_like(true), error.abs(), error**2, true, true**2]).sum(1))

    def compute(self) -> dict[str, float]:
        number, absolute, square, total, total_square = self.totals()
        std = torch.tensor(self.kind.values["std"], dtype=torch.float64)
        spread = total_square - total**2 / number
        # Batches are summed in float32: a difference below a share of 1e-5 is rounding.
        r2 = torch.where(spread > 1e-5 * total_square, 1 - square / spread, math.nan)
        return {
            "r2": float(r2.nanmean()),
            "mae": float((absolute / number * std).mean()),
            "rmse": float(((square / number).sqrt() * std).mean()),
        }


def number_in(text: str, column: str) -> float:
    """Raises ValueError, which names the column."""
    text = text.strip()
    if NUMBER.fullmatch(text) and abs(number := float(text)) <= LARGEST:
        return number
    wrong = (
        "has a decimal comma" if re.fullmatch(r"[+-]?\d+,\d+", text) else "is no finite number" if text else "is empty"
    )
    raise ValueError(f"{column} {wrong}; a number is written as 3.5 or 1e6")


def numbers_in(text: str, count: int) -> tuple[float, ...]:
    """The label of an image. Raises UserError: an own source may have any text."""
    parts = text.split(";")
    try:
        if len(parts) != count:
            raise ValueError(f"it needs {plural(count, 'number')}, joined by ;")
        return tuple(number_in(part, "it") for part in parts)
    except ValueError as error:
        found = f"the source of the images has a label that cannot be used: {printable(text)[:60]!r}"
        raise UserError(found, where="data.source", why=str(error), code=ExitCode.DATA) from error


def columns_of(images: LabelledImages, split: str) -> list[tuple[str, np.ndarray]]:
    """Each name with the values of a split, float64 (N,): label tensors are float32."""
    labels = [images.labels[index] for index in images.splits[split]]
    values = np.array(labels, dtype=np.float64).reshape(len(labels), len(images.classes))
    return list(zip(images.classes, values.T, strict=True))


def ranks(values: np.ndarray) -> np.ndarray:
    """How many values are smaller; equal values, such as those of copies of an image, have the same rank."""
    return np.searchsorted(np.sort(values), values)
