"""task=multilabel: an image shows any number of several labels, none of them too."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from src.config import Config
from src.engine.images.label_split import iterative_split
from src.engine.images.labelled_images import Label, LabelledImages
from src.engine.runs.errors import data_error
from src.engine.runs.files import write_csv
from src.engine.runs.introduction import FEW, class_counts
from src.engine.runs.text import few, plural, printable, shell_word
from src.engine.steps.label_metrics import LabelMetrics, average_precisions, best_threshold
from src.engine.steps.task_kind import TaskKind, number_of, own_loss
from src.models.losses import MultilabelLoss, positive_weights

log = logging.getLogger(__name__)

SHOWN = 4  # likeliest labels of an image on the screen
ENOUGH = 5  # images of val with a label, from which on its threshold is chosen
TABLE = ("label", "images", "predicted", "precision", "recall", "f1", "ap", "threshold")  # columns of labels.csv


def names_in(text: str) -> list[str]:
    """The labels of 'cat; outdoor'."""
    return [name for part in text.split(";") if (name := part.strip())]


class Multilabel(TaskKind):
    """Each label has a logit, whose sigmoid is its probability; an image has the labels that reach their thresholds.

    threshold: of all labels; None: 0.5 in training, then one per label, chosen on val.
    """

    table, noun = "labels", "labels"

    def __init__(self, threshold: float | None = None, values: Mapping[str, Sequence[float]] | None = None) -> None:
        super().__init__(values)
        self.tunes = threshold is None
        if threshold is not None:
            self.values["threshold"] = (threshold,)

    # Labels

    def label_text(self, cells: Mapping[str, str]) -> str:
        """'cat;outdoor' of one cell that says so, or of the names of the columns with a 1."""
        if len(cells) == 1:
            return ";".join(sorted({*names_in(*cells.values())}))
        for name, cell in cells.items():
            if cell.strip().lower() not in ("0", "1", "false", "true"):
                raise ValueError(f"column {printable(name)}: {printable(cell)[:60]!r} is not 0, 1, false or true")
        return ";".join(name for name, cell in cells.items() if cell.strip().lower() in ("1", "true"))

    def words(self, texts: Sequence[str]) -> list[str]:
        return [name for text in texts for name in names_in(text)]

    def names(self, texts: Sequence[str], columns: Sequence[str] = (), known: Sequence[str] = ()) -> tuple[str, ...]:
        several = [column.strip() for column in columns] if len(columns) > 1 else ()
        names = tuple(known or several or sorted({*self.words(texts)}))
        if wrong := [name for name in names if names_in(name) != [name]]:
            raise data_error(
                f"a label cannot be called {printable(wrong[0])!r}",
                where=f"the labels are {few(names)}",
                why="labels are separated by ; and have no blanks around them",
                fix="give it another name",
            )
        if unknown := {*self.words(texts)}.difference(names):
            raise data_error(
                f"{plural(len(unknown), 'label')} of the images: {few(sorted(unknown))}",
                where=f"the labels are {few(names)}",
                why="every label of an image has to be one of them",
                fix="add them to the classes of the ImageSet, or correct its labels",
            )
        return names

    def labels(self, texts: Sequence[str], names: Sequence[str]) -> list[Label]:
        number, values = number_of(names), dict[str, tuple[float, ...]]()
        for text in {*texts}:
            own = {number[name] for name in names_in(text)}
            values[text] = tuple(float(place in own) for place in range(len(names)))
        return [values[text] for text in texts]

    def split(
        self, texts: Sequence[str], seed: int, val_fraction: float, test_fraction: float, copies: Sequence[str] | None
    ) -> dict[str, list[int]]:
        return iterative_split(self.strata(texts), seed, val_fraction, test_fraction, copies)

    def strata(self, texts: Sequence[str]) -> list[frozenset[str]]:
        return [frozenset(names_in(text)) for text in texts]

    def check(self, images: LabelledImages, where: str) -> None:
        """Every label needs images with it in train and val, and images without it in train."""
        if not images.classes:
            raise data_error(
                "no image has a label",
                where=printable(where),
                why="labels stand in the column label, separated by ;, or each has a column of 0 and 1",
                fix=f"head -3 {shell_word(where)}",
            )
        train, total = images.counts("train"), len(images.splits["train"])
        without = {
            "no image in the train split": [count == 0 for count in train],
            "every image of the train split": [count == total for count in train],
            "no image in the val split": [count == 0 for count in images.counts("val")],
        }
        for what, is_missing in without.items():
            if missing := [name for name, is_so in zip(images.classes, is_missing, strict=True) if is_so]:
                raise data_error(
                    f"{plural(len(missing), 'label')} with {what}: {few(missing)}",
                    where=printable(where),
                    why=f"{'its numbers could not be measured' if 'val' in what else 'it could not be learned'}; a label "
                    "needs 3 images with it (copies of a file count as one), and images without it",
                    fix=[f"add such images of {printable(missing[0])}, or remove the label", f"ls {shell_word(where)}"],
                )

    def counted(self, names: Sequence[str]) -> str:
        return f"with {plural(len(names), 'label')}"

    def described(self, images: LabelledImages) -> list[str]:
        numbers = images.targets([index for members in images.splits.values() for index in members]).sum(1)
        without = f", {int((numbers == 0).sum())} have none" if (numbers == 0).any() else ""
        return [f"labels    {class_counts(images)}", f"          {float(numbers.mean()):.1f} per image{without}"]

    def warning(self, images: LabelledImages) -> str:
        """Of labels with few training images, and of those that no image of test has."""
        train, test = (dict(zip(images.classes, images.counts(split), strict=True)) for split in ("train", "test"))
        rare, texts = sorted((name for name in train if train[name] < FEW), key=lambda name: train[name]), []
        if rare:
            shown = few([f"{name} {train[name]}" for name in rare], 3)
            texts.append(
                f"{len(rare)} of {plural(len(train), 'label')} have fewer than {FEW} training images ({shown}): their own "
                "numbers are little more than chance."
            )
        if images.splits["test"] and (unmeasured := [name for name in test if not test[name]]):
            texts.append(f"Without an image in test, and so in none of its numbers: {few(unmeasured, 3)}.")
        if lists := [name for name in train if "," in name or "|" in name]:
            texts.append(f"Labels are separated by ; so {printable(lists[0])} is one label.")
        return " ".join(texts)

    # Training

    def loss(self, config: Config, names: Sequence[str], labels: Tensor) -> MultilabelLoss:
        model, example = config.model, torch.zeros(2, len(names))
        own = None if model.loss == "cross_entropy" else own_loss(model.loss, model.loss_options, example, example)
        return MultilabelLoss(positive_weights(labels, config.data.class_weights), own)

    def metrics(self, names: Sequence[str], split: str) -> Metric:
        return LabelMetrics(len(names), ranked=split != "train")

    # What the outputs say

    def predicted(self, logits: Tensor) -> Tensor:
        return self.reach(self.probabilities(logits)).float()

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()

    def logits_of(self, answers: Tensor) -> Tensor:
        return answers.logit(1e-7)

    def reach(self, probabilities: Tensor) -> Tensor:
        """bool (..., names): whether a label's probability reaches its threshold."""
        if chosen := self.values.get("thresholds"):
            return probabilities >= torch.tensor(chosen, device=probabilities.device)
        return probabilities >= self.values.get("threshold", (0.5,))[0]

    def thresholds(self, names: Sequence[str]) -> tuple[float, ...]:
        return self.values.get("thresholds") or self.values.get("threshold", (0.5,)) * len(names)

    def check_values(self, names: Sequence[str]) -> None:
        if not (len(self.thresholds(names)) == len(names) and all(0 <= value <= 1 for value in self.thresholds(names))):
            raise ValueError("the thresholds are not one number from 0 to 1 for each label")

    def tune(self, logits: Tensor, labels: Tensor) -> None:
        """Chooses the thresholds for the F1 of each label."""
        pairs = list(zip(self.probabilities(logits).T, labels.T, strict=True))
        is_rare = labels.sum(0) < ENOUGH
        chosen = [0.5 if rare else best_threshold(*pair) for rare, pair in zip(is_rare, pairs, strict=True)]
        self.values["thresholds"] = tuple(chosen)
        rest = (
            f"0.5 for {plural(int(is_rare.sum()), 'label')} with fewer than {ENOUGH} val images"
            if is_rare.any()
            else ""
        )
        if not is_rare.all():
            first = f"chosen on val for the F1 of {plural(int((~is_rare).sum()), 'label')}, which is a little too good there"
            rest = f"{first}; {rest}".removesuffix("; ")
        log.info(f"thresholds: {rest}")

    # What is written

    def kept(self, logits: Tensor, labels: Tensor) -> Tensor:
        """float32 (B, 2 * names): logits, then labels."""
        return torch.cat([logits.float(), labels.float()], 1)

    def write(self, path: Path, names: Sequence[str], kept: Tensor) -> None:
        """labels.csv. Empty: what a label without such images, or one that was never predicted, does not have."""
        logits, labels = kept.chunk(2, 1)
        predicted = self.predicted(logits)
        counts = torch.stack([predicted * labels, predicted, labels]).sum(1).long().T.tolist()
        rows = []
        for name, (right, told, true), ap, threshold in zip(
            names, counts, average_precisions(logits, labels), self.thresholds(names), strict=True
        ):
            shares = [right / told if told else None, right / true if true else None]
            shares += [2 * right / (told + true), ap] if true else [None, None]
            rows.append([name, true, told, *("" if x is None else f"{x:.6f}" for x in shares), f"{threshold:.6g}"])
        write_csv(path, TABLE, rows)

    def header(self, names: Sequence[str]) -> list[str]:
        return ["labels", *(f"probability_{name}" for name in names)]

    def row(self, names: Sequence[str], answers: Sequence[float]) -> list[str]:
        is_shown = self.reach(torch.tensor(answers))
        own = [name for name, shown in zip(names, is_shown, strict=True) if shown]
        return [";".join(own), *(f"{probability:.6f}" for probability in answers)]

    def shown(self, names: Sequence[str], row: Sequence[str]) -> tuple[str, str, str]:
        if row[1:] == self.header(names)[1:]:
            return "labels", "probability", "next below its threshold"
        probability = dict(zip(names, map(float, row[1:]), strict=True))
        likeliest = sorted(probability, key=lambda name: -probability[name])
        own = {*names_in(row[0])}
        first = [name for name in likeliest if name in own][:SHOWN]
        more = f" and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
        below = [f"{name} {probability[name]:.2f}" for name in likeliest if name not in own][:1]
        shares = " ".join(f"{probability[name]:.2f}" for name in first)
        return (", ".join(first) or "none") + more, shares, "".join(below)

    def purpose(self, names: Sequence[str]) -> str:
        return f"says which of {plural(len(names), 'label')} an image has, perhaps none"

    def reading(self, names: Sequence[str]) -> str:
        pairs = [f"{name} {value:.4g}" for name, value in zip(names, self.thresholds(names), strict=True)]
        return (
            "a logit per label: its sigmoid is the label's probability. An image has the labels whose probability reaches "
            f"their threshold ({few(pairs, 20)}; task_values in model.json)"
        )
