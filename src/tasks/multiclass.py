"""task=multiclass: an image shows one of several classes."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from src.config import Config
from src.engine.images.labelled_images import Label, LabelledImages
from src.engine.images.splits import check_splits
from src.engine.runs.introduction import class_counts, uneven_classes
from src.engine.runs.tables import write_confusion
from src.engine.steps.label_metrics import rates
from src.engine.steps.task_kind import TaskKind, number_of, own_loss
from src.models.losses import ClassificationLoss, class_weights

TOP = 5  # likeliest classes in a row of predictions.csv


class Multiclass(TaskKind):
    """Labels are the names of classes; softmax makes probabilities of the logits."""

    top = TOP

    def labels(self, texts: Sequence[str], names: Sequence[str]) -> list[Label]:
        number = number_of(names)
        return [number[text] for text in texts]

    def check(self, images: LabelledImages, where: str) -> None:
        check_splits(images, where)

    def described(self, images: LabelledImages) -> list[str]:
        return [f"classes   {class_counts(images)}"]

    def warning(self, images: LabelledImages) -> str:
        return uneven_classes(images)

    def loss(self, config: Config, names: Sequence[str], labels: Tensor) -> ClassificationLoss:
        model = config.model
        counts = labels.bincount(minlength=len(names)).tolist()
        own = None
        if model.loss != "cross_entropy":
            example = torch.zeros(2, max(2, len(names))), torch.tensor([0, 1])
            own = own_loss(model.loss, model.loss_options, *example, counts)
        return ClassificationLoss(class_weights(counts, config.data.class_weights), model.label_smoothing, own)

    def metrics(self, names: Sequence[str], split: str) -> Metric:
        return ClassCounts(len(names))

    def predicted(self, logits: Tensor) -> Tensor:
        return logits.argmax(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(1)

    def logits_of(self, answers: Tensor) -> Tensor:
        return answers.clamp(min=torch.finfo(answers.dtype).tiny).log()

    def kept(self, logits: Tensor, labels: Tensor) -> Tensor:
        """int64 (B, 2): the true and the predicted class."""
        return torch.stack([labels, self.predicted(logits)], 1)

    def write(self, path: Path, names: Sequence[str], kept: Tensor) -> None:
        pairs, counts = kept.unique(dim=0, return_counts=True)
        write_confusion(path, names, torch.cat([pairs, counts[:, None]], 1).tolist())

    def header(self, names: Sequence[str]) -> list[str]:
        ranks = range(1, min(self.top or TOP, len(names)) + 1)
        return ["class", "probability", *(f"{word}_{rank}" for rank in ranks for word in ("class", "probability"))]

    def row(self, names: Sequence[str], answers: Sequence[float]) -> list[str]:
        pairs = [(names[number], f"{answers[number]:.6f}") for number in self.ranked(answers)]
        return [*pairs[0], *(cell for pair in pairs[: self.top] for cell in pair)]

    def ranked(self, answers: Sequence[float]) -> list[int]:
        """The likeliest classes, the one that is predicted first."""
        return nlargest(self.top or TOP, range(len(answers)), key=lambda number: answers[number])

    def measured_header(self, names: Sequence[str]) -> list[str]:
        return ["true", "predicted", *(f"probability_{name}" for name in names)]

    def measured_row(self, names: Sequence[str], label: str, answers: Sequence[float]) -> list[str]:
        return [label, names[self.ranked(answers)[0]], *(f"{probability:.6f}" for probability in answers)]

    def confidence(self, answers: Sequence[float]) -> float:
        return answers[self.ranked(answers)[0]]

    def shown(self, names: Sequence[str], row: Sequence[str]) -> tuple[str, str, str]:
        others = list(zip(row[4:8:2], row[5:8:2], strict=True))
        if row[1] == "probability":  # the header
            return row[0], row[1], f"next {len(others)}" if others else ""
        return row[0], f"{float(row[1]):.3f}", ", ".join(f"{name} {float(share):.2f}" for name, share in others)

    def purpose(self, names: Sequence[str]) -> str:
        return f"says which of {len(names)} classes an image shows"

    def reading(self, names: Sequence[str]) -> str:
        return "a logit per class: softmax gives the probabilities"


class ClassCounts(Metric):
    """Images per class: predicted correctly, predicted, true. A confusion matrix of 10,000 classes would fill 800 MB."""

    full_state_update = False
    classes: torch.Tensor  # int32 (3, C): correct, predicted, true

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("classes", torch.zeros(3, num_classes, dtype=torch.int32), dist_reduce_fx="sum")

    def update(self, predicted: torch.Tensor, labels: torch.Tensor) -> None:
        number = self.classes.shape[1]
        right = (predicted == labels).int()
        places = torch.cat([labels, predicted + number, labels + 2 * number])
        added = torch.cat([right, torch.ones_like(right), torch.ones_like(right)])
        self.classes = self.classes.view(-1).index_add(0, places, added).view(3, number)

    def compute(self) -> dict[str, float]:
        """acc, balanced_acc (mean recall) and macro_f1, over the classes that occur among the labels."""
        return rates(self.classes)
