"""Images of a report, small, as data: addresses, so that the page stays a single file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from src.engine.reports.answers import Answer, Answers
from src.engine.reports.files import Row

if TYPE_CHECKING:
    from torch import Tensor

    from src.engine.runs.shown import Shown

SIDE = 144  # pixels of the longer side; the page shows them at 112, which is sharp on most screens
SAMPLES, DOUBTS = 12, 24
LISTED = 50  # rows of doubts.csv, in a page without images


@dataclass(frozen=True)
class Tile:
    """source: a data: address; empty: the image cannot be read. lines: below the image."""

    source: str
    lines: list[str]


@dataclass(frozen=True)
class Gallery:
    """All images of a page. doubts, in_doubt: rows of doubts.csv, and how many there are (None: labels were not checked)."""

    has_images: bool
    samples: list[Tile]
    doubts: list[Row]
    in_doubt: int | None
    doubtful: list[Tile]
    kind: str
    mistakes: list[Tile]
    unsure: list[Tile]
    explained: list[Tile]
    note: str

    @classmethod
    def of(
        cls, shown: Shown | None, rows: Sequence[Row], doubts: Sequence[Row] | None, answers: Answers | None
    ) -> Gallery:
        listed, in_doubt = [*(doubts or [])], None if doubts is None else len(doubts)
        kind = answers.kind if answers else ""
        if shown is None:
            return cls(False, [], listed[:LISTED], in_doubt, [], kind, [], [], [], "")
        mistakes = answers.mistakes() if answers else []
        unsure = answers.unsure() if answers else []
        explain = shown.config.report.explain
        explained, note = _explained(shown, mistakes, kind) if explain else ([], "")
        return cls(
            True,
            _samples(shown, rows),
            listed[:LISTED],
            in_doubt,
            _in_doubt(shown, listed),
            kind,
            _of_answers(shown, mistakes, kind),
            _of_answers(shown, unsure, kind),
            explained,
            note,
        )


def _samples(shown: Shown, rows: Sequence[Row]) -> list[Tile]:
    """Training images after the training transform, of as many different labels as there are."""
    from src.engine.runs import seeding

    tiles = []
    for number in _of_different_labels(rows):

        def augmented(image: Tensor, number: int = number) -> Tensor:
            with seeding.image_randomness(shown.config.seed, 0, number):
                return shown.training(image)

        tiles.append(tile(shown, rows[number]["path"], [rows[number]["label"]], augmented))
    return tiles


def _of_different_labels(rows: Sequence[Row]) -> list[int]:
    """Up to SAMPLES training rows: the first of each label, then the second of each."""
    seen: dict[str, int] = {}
    order = []
    for number, row in enumerate(rows):
        if row["split"] == "train":
            seen[row["label"]] = seen.get(row["label"], 0) + 1
            order.append((seen[row["label"]], number))
    return [number for _, number in sorted(order)[:SAMPLES]]


def _in_doubt(shown: Shown, doubts: Sequence[Row]) -> list[Tile]:
    """The whole images, since what the network does not see may be what the label is about."""
    tiles = []
    for row in doubts[:DOUBTS]:
        sure = f" ({float(row['probability']):.2f})" if row["probability"] else ""
        lines = [f"label: {row['label']}", f"suggested: {row['suggested']}{sure}", row["path"]]
        tiles.append(tile(shown, row["path"], lines))
    return tiles


def _of_answers(shown: Shown, answers: Sequence[Answer], kind: str) -> list[Tile]:
    """As the network saw them."""
    from src.engine.images.resizing import eval_transform

    tiles = []
    for answer in answers:
        sure = "" if kind == "values" else f" ({answer.share:.2f})"
        lines = [f"{answer.told}{sure}", f"label: {answer.true}", answer.path]
        tiles.append(tile(shown, answer.path, lines, eval_transform(shown.preprocessing)))
    return tiles


def _explained(shown: Shown, answers: Sequence[Answer], kind: str) -> tuple[list[Tile], str]:
    """The mistakes with what the network looked at, and a note."""
    import torch

    from src.engine.images.reading import ImageError
    from src.engine.images.resizing import eval_transform
    from src.engine.reports.grad_cam import overlaid

    model, transform = shown.model, eval_transform(shown.preprocessing)
    if model is None:
        return [], "The run has no model yet, whose mistakes could be explained."
    read = []
    for answer in answers:
        with suppress(ImageError, LookupError, OSError):
            read.append((answer, transform(shown.read(answer.path))))
    if not read:
        return [], ""
    number = model.kind.outputs(model.card.classes)
    if number not in (1, len(model.card.classes)):
        return [], "Grad-CAM is left out: this task does not have an output for each class."
    one_output = number == 1 and kind == "classes"
    outputs, signs = [], []
    for answer, _ in read:
        place = model.card.classes.index(answer.name)
        outputs.append(0 if one_output else place)
        signs.append(-1.0 if (one_output and place == 0) or (kind == "labels" and answer.told != answer.name) else 1.0)
    try:
        found = overlaid(model, torch.stack([image for _, image in read]), outputs, signs)
    except RuntimeError as error:  # such as out of memory, or hooks that an own backbone does not allow
        return [], f"Grad-CAM is left out: {error}"
    if found is None:
        return [], "Grad-CAM is left out: this network has no feature map with places, which it is made of."
    tiles = [
        Tile(address(image), [answer.told, f"label: {answer.true}"])
        for (answer, _), image in zip(read, found[0], strict=True)
    ]
    return tiles, f"Red: where the network found what it answered (Grad-CAM, a map of {found[1]} x {found[1]} places)."


def tile(shown: Shown, path: str, lines: list[str], transform: Callable[[Tensor], Tensor] | None = None) -> Tile:
    from src.engine.images.reading import ImageError

    try:
        image = shown.read(path)
    except (ImageError, LookupError, OSError):
        return Tile("", [*lines, "the image cannot be read"])
    return Tile(address(transform(image) if transform else image), lines)


def address(image: Tensor) -> str:
    """uint8 (3, H, W) as a JPEG in a data: address."""
    from PIL import Image

    small, file = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
