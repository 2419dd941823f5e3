"""Labels in doubt: images whose label a linear model that has not seen them contradicts with confidence.

Confident learning (Northcutt, Jiang and Chuang, 2021, Journal of Artificial Intelligence Research 70, p. 1373): an image of
one class counts as another's if its probability for that class is at least the mean over the class's own images. Training
images have the out-of-fold probabilities of the baseline's cross-validation, those of val and test the baseline's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from src.engine.images.labelled_images import LabelledImages
from src.engine.runs.files import write_csv
from src.engine.runs.task import RunTask

HEADER = ("path", "split", "label", "suggested", "probability")  # probability: of what is suggested
FAR = 4.0  # robust standard deviations (1.4826 times the median) of a residual, for labels that are numbers

Doubt = tuple[float, int, str, str, str]  # how doubtful, more is more; place, label, suggested, probability


def write_doubts(path: Path, task: RunTask, members: Sequence[int], logits: Tensor) -> None:
    """The images in doubt, the most doubtful first. members: indices of images; logits: theirs, (N, outputs), nan where no
    model has left the image out."""
    kept = logits.isfinite().all(1)
    members = [index for index, is_kept in zip(members, kept.tolist(), strict=True) if is_kept]
    images, logits = task.images, logits[kept]
    labels = images.targets(members)
    if labels.ndim == 1:
        found = _of_classes(images, task.kind.probabilities(logits), labels)
    elif task.kind.in_order:
        found = _of_values(images, task.kind.answers(logits), labels)
    else:
        found = _of_labels(images, task.kind.probabilities(logits), labels)
    split_of = {index: split for split, indices in images.splits.items() for index in indices}
    rows = sorted(found, key=lambda doubt: (-doubt[0], doubt[1]))
    write_csv(path, HEADER, [(images.names[members[at]], split_of[members[at]], *cells) for _, at, *cells in rows])


def suggestions(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The class (N,) that each image counts as: its label where there is no doubt. probabilities: (N, C)."""
    own = probabilities.gather(1, labels[:, None])[:, 0]
    mean = torch.zeros(probabilities.shape[1]).index_add(0, labels, own) / labels.bincount(
        minlength=probabilities.shape[1]
    )
    reached = torch.where(probabilities >= mean, probabilities, -1.0)  # a class without images has a mean of nan
    highest, suggested = reached.max(1)
    return torch.where(highest >= 0, suggested, labels)


def _of_classes(images: LabelledImages, probabilities: Tensor, labels: Tensor) -> Iterator[Doubt]:
    suggested = suggestions(probabilities, labels)
    for at in (suggested != labels).nonzero()[:, 0].tolist():
        own, other = int(labels[at]), int(suggested[at])
        margin = float(probabilities[at, other] - probabilities[at, own])
        yield margin, at, images.classes[own], images.classes[other], f"{float(probabilities[at, other]):.4f}"


def _of_labels(images: LabelledImages, probabilities: Tensor, labels: Tensor) -> Iterator[Doubt]:
    """Of several labels each is a question of its own: an image has it or not."""
    for place, name in enumerate(images.classes):
        has = probabilities[:, place]
        answers = ("not " + name, name)
        both, own = torch.stack([1 - has, has], 1), labels[:, place].long()
        for at in (suggestions(both, own) != own).nonzero()[:, 0].tolist():
            label, share = int(own[at]), float(both[at, 1 - own[at]])
            yield 2 * share - 1, at, answers[label], answers[1 - label], f"{share:.4f}"


def _of_values(images: LabelledImages, answers: Tensor, labels: Tensor) -> Iterator[Doubt]:
    residuals = (answers - labels).abs()
    scale = 1.4826 * residuals.median(0).values
    for at, place in (residuals > FAR * scale).nonzero().tolist():
        before = f"{images.classes[place]} " if len(images.classes) > 1 else ""
        label, suggested = (f"{before}{float(values[at, place]):.6g}" for values in (labels, answers))
        yield float(residuals[at, place] / scale[place]), at, label, suggested, ""
