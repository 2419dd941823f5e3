"""What the engine asks of a task: how a label is read, what the network's outputs say, how well, and how that is written.

task=multiclass and the others are classes in src/tasks/; your own is one more (docs/your_own.md). A label is a text, as a
table or split.csv has it, until `labels` makes numbers of it: a class's number, or one value for each of the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from src.engine.images.groups import whole
from src.engine.images.labelled_images import Label, LabelledImages
from src.engine.images.splits import stratified_split
from src.engine.own import build_part, own_object, owner_errors, wrong_result
from src.engine.runs.errors import UserError
from src.engine.steps.losses import LOSSES

if TYPE_CHECKING:
    from src.engine.commands.schema import Config


class Loss(torch.nn.Module):
    """logits (B, outputs), labels (B,) or (B, names) -> the mean loss."""

    def weight(self, labels: Tensor) -> Tensor | int:
        """The divisor of the mean over these labels: the gradients of unequal parts of a batch are weighed with it."""
        return len(labels)


class TaskKind:
    """One object per run or model. values: what it found in the labels (`fit`, `tune`), which model.json keeps."""

    name = ""  # as task=NAME has it
    table = "confusion"  # the file of results is confusion.csv
    has_probabilities = True  # or its answers are quantities
    min_confidence: float | None = None  # rows of predictions.csv with less are marked as unsure; None: no such column
    top: int | None = None  # likeliest classes in a row of predictions.csv; None: all answers stand in it
    tunes = False  # whether `tune` chooses values on val
    noun = "classes"  # what the names are
    in_order = False  # whether a label's text has a value for each of the names, in their order
    less_is_better: tuple[str, ...] = ()  # those of its metrics that checkpoint.monitor has to make small

    def __init__(self, values: Mapping[str, Sequence[float]] | None = None) -> None:
        self.values = {name: tuple(numbers) for name, numbers in (values or {}).items()}

    @property
    def temperature(self) -> float:
        """What the network divides its logits by; 1 where it is not calibrated."""
        return self.values.get("temperature", (1.0,))[0]

    # Labels

    def label_text(self, cells: Mapping[str, str]) -> str:
        """The label in a row of a table: column -> cell, of the columns that data.label_columns names. Raises ValueError."""
        if len(cells) > 1:
            raise ValueError("the label of this task is one column")
        (text,) = cells.values()
        if not text.strip():
            raise ValueError("every image needs a label")
        return text

    def text_of(self, label: int | str, classes: Sequence[str]) -> str:
        """The text of a label that an ImageSet gives: a class's number, or the text itself."""
        return label if isinstance(label, str) else classes[label]

    def words(self, texts: Sequence[str]) -> Sequence[str]:
        """The names that the labels mention, which must be spelled alike everywhere."""
        return texts

    def names(self, texts: Sequence[str], columns: Sequence[str] = (), known: Sequence[str] = ()) -> tuple[str, ...]:
        """What is told apart, or measured, in the order of the network's answers. columns: data.label_columns. known: the
        names of an ImageSet, in its order."""
        return tuple(known or sorted(set(self.words(texts))))

    def columns(self, names: Sequence[str], given: Sequence[str]) -> Sequence[str]:
        """data.label_columns of a table to measure a model on. names: the model's. given: as they are set."""
        return given

    def labels(self, texts: Sequence[str], names: Sequence[str]) -> list[Label]:
        """The label of each text. Raises KeyError for a name that is none of them."""
        raise NotImplementedError

    def split(
        self, texts: Sequence[str], seed: int, val_fraction: float, test_fraction: float, copies: Sequence[str] | None
    ) -> dict[str, list[int]]:
        """Indices of train, val and test. copies: images with the same text in it go to one split together."""
        return stratified_split(texts, seed, val_fraction, test_fraction, copies)

    def strata(self, texts: Sequence[str]) -> Sequence[Iterable[str]]:
        """What groups of images and folds are balanced by, for each image: its class, or its labels."""
        return whole(texts)

    def check(self, images: LabelledImages, where: str) -> None:
        """Raises UserError for labels or splits that nothing can be learned from. where: the source of the images."""

    def counted(self, names: Sequence[str]) -> str:
        """'in 10 classes'"""
        return f"in {len(names)} {self.noun}"

    def described(self, images: LabelledImages) -> list[str]:
        """Lines for the beginning of a run."""
        return []

    def warning(self, images: LabelledImages) -> str:
        """What an owner of such data should know before the numbers appear, or nothing."""
        return ""

    # Training

    def outputs(self, names: Sequence[str]) -> int:
        """How many the network has."""
        return len(names)

    def fit(self, images: LabelledImages) -> None:
        """Sets values that follow from the labels of the training images, before the network is made."""

    def check_values(self, names: Sequence[str]) -> None:
        """Raises ValueError for values of a model.json that `fit` and `tune` never set."""

    def loss(self, config: Config, names: Sequence[str], labels: Tensor) -> Loss:
        """A new loss. labels: of the training images; none where data.class_weights does not ask for them."""
        raise NotImplementedError

    def metrics(self, names: Sequence[str], split: str) -> Metric:
        """Updated with what its `update` names: logits, labels, predicted, probabilities. `compute` gives name -> number.
        The states are tensors that are summed over processes; for the splits val and test they may also be lists."""
        raise NotImplementedError

    # What the outputs say

    def predicted(self, logits: Tensor) -> Tensor:
        """Like labels: (B,) or (B, names)."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """float32 (B, names)."""
        raise NotImplementedError

    def answers(self, logits: Tensor) -> Tensor:
        """What predict gives, float32 (B, names): the probabilities, unless the names are quantities."""
        return self.probabilities(logits)

    def logits_of(self, answers: Tensor) -> Tensor:
        """The inverse of `answers`: logits with these, for the mean of several models."""
        raise UserError(f"task={self.name} does not say how answers are averaged", why="its class has no logits_of")

    def tune(self, logits: Tensor, labels: Tensor) -> None:
        """Sets values that are chosen on val, once the weights are final."""

    # What is written

    def kept(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What `write` needs of a batch, (B, any)."""
        raise NotImplementedError

    def write(self, path: Path, names: Sequence[str], kept: Tensor) -> None:
        """Writes the table of results, from `kept` of all images of a split."""
        raise NotImplementedError

    def header(self, names: Sequence[str]) -> list[str]:
        """The columns of predictions.csv between path and error."""
        raise NotImplementedError

    def row(self, names: Sequence[str], answers: Sequence[float]) -> list[str]:
        """The cells of these columns for one image."""
        raise NotImplementedError

    def measured_header(self, names: Sequence[str]) -> list[str]:
        """The columns that an evaluation's predictions.csv has behind path."""
        return ["true", *self.header(names)]

    def measured_row(self, names: Sequence[str], label: str, answers: Sequence[float]) -> list[str]:
        """The cells of these columns. label: the text of the image's label."""
        return [label, *self.row(names, answers)]

    def confidence(self, answers: Sequence[float]) -> float:
        """The probability that the answer is right; of several labels, that of the least sure one."""
        return min(max(probability, 1 - probability) for probability in answers)

    def shown(self, names: Sequence[str], row: Sequence[str]) -> tuple[str, str, str]:
        """A row for the screen: what it is, how sure, and what else it may be. The header is given as one, too."""
        return row[0], "", ""

    def purpose(self, names: Sequence[str]) -> str:
        """For the model's README: 'says which of 10 classes an image shows'."""
        raise NotImplementedError

    def reading(self, names: Sequence[str]) -> str:
        """For the model's README: how the network's outputs are read."""
        raise NotImplementedError


def number_of(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def own_loss(name: str, options: Mapping[str, Any], logits: Tensor, labels: Tensor, counts: Sequence[int] = ()) -> Any:
    """One of LOSSES, or model.loss=src.my_losses.mine: a function of logits, labels and the options, or a class that is made
    with the options and called with logits and labels. Raises UserError unless it gives one loss per image, which is what
    keeps a batch in parts or over several devices equal to the whole. logits, labels: examples of two images. counts:
    training images of each class."""
    key = "model.loss"
    if name in LOSSES:
        return build_part(key, name, LOSSES, {"counts": counts}, options)
    part = own_object(key, name)
    with owner_errors(key, name):
        own = part(**options) if isinstance(part, type) else partial(part, **options)
        each = own(logits, labels)
    if not isinstance(each, Tensor) or each.shape != labels.shape[:1]:
        found = f"a result of shape {tuple(each.shape)}" if isinstance(each, Tensor) else f"a {type(each).__name__}"
        raise wrong_result(key, name, f"the loss of each image: shape (2,) for logits {tuple(logits.shape)}", found)
    return own
