"""From a model folder and a folder of pictures to predictions.csv: the work of src/predict.py."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from src.checkpoints.model_folder import ModelCard, load_model
from src.cores import cpu_cores
from src.data.folders import list_pictures
from src.data.reading import PictureError, read_picture
from src.data.transforms import eval_transform
from src.errors import ExitCode, UserError
from src.machine import choose_device
from src.models.building import rebuild
from src.models.losses import probabilities
from src.out_of_memory import InParts
from src.run_dir import write_csv
from src.strategies.precision import autocast, usable_precision

log = logging.getLogger(__name__)

TOP = 5
SHOWN = 10


def predict(model: Path, images: Path, out: Path, batch_size: int, num_workers: int | None, accelerator: str) -> None:
    """Writes out (CSV) and shows its first rows. Raises UserError for a model or pictures that are not there."""
    card, state = load_model(model)
    if not images.exists():
        raise UserError(
            f"images={images} does not exist",
            where=str(images.absolute()),
            why="relative paths start from the folder the command is run in",
            fix=f"ls {images.parent}",
            code=ExitCode.NO_INPUT,
        )
    paths = list_pictures(images)
    if not paths:
        raise UserError(
            f"no picture was found in {images}",
            where=str(images.absolute()),
            why="it and its sub-folders hold no file of a format that is read",
            fix=f"find {images} -type f | head",
            code=ExitCode.NO_INPUT,
        )
    device = choose_device(accelerator)
    precision = usable_precision(card.precision, device)
    forward = InParts(rebuild(card, state).to(device).eval())
    workers = num_workers if num_workers is not None else (cpu_cores() if len(paths) > 200 else 0)
    loader = DataLoader(_Files(paths, card), batch_size, num_workers=workers, collate_fn=_collate)
    rows: list[list[str]] = []
    with torch.inference_mode():
        for images_, places, errors in track(loader, "predicting", transient=True, disable=not sys.stderr.isatty()):
            with autocast(precision, device):
                logits = forward(images_.to(device)) if places else torch.empty(0, 1)
            shares = probabilities(logits, card.task).cpu()
            rows += _rows(paths, card.classes, places, shares, errors)
    rows.sort()
    top = min(TOP, len(card.classes))
    header = [
        "path",
        "class",
        "probability",
        *(f"{word}{i}" for i in range(1, top + 1) for word in ("class_", "probability_")),
        "error",
    ]
    write_csv(out, header, rows)
    bad = [row for row in rows if row[-1]]
    _show(rows, top)
    log.info(f"{out} has all {len(rows)} rows; {len(bad)} of them are files that could not be read")


class _Files(Dataset[tuple[int, torch.Tensor | str]]):
    """place -> (place, uint8 (3, S, S)) or (place, why the file cannot be read)."""

    def __init__(self, paths: list[Path], card: ModelCard) -> None:
        self.paths, self.options = paths, card.read_options
        self.transform = eval_transform(card.preprocessing)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[int, torch.Tensor | str]:
        try:
            return place, self.transform(read_picture(self.paths[place], self.options))
        except PictureError as error:
            return place, str(error)


def _collate(
    items: list[tuple[int, torch.Tensor | str]],
) -> tuple[torch.Tensor, list[int], dict[int, str]]:
    """The pictures that could be read as a batch, their places, and the errors of the others."""
    good = [(place, item) for place, item in items if isinstance(item, torch.Tensor)]
    errors = {place: item for place, item in items if isinstance(item, str)}
    images = torch.stack([item for _, item in good]) if good else torch.empty(0)
    return images, [place for place, _ in good], errors


def _rows(
    paths: list[Path], classes: tuple[str, ...], places: list[int], shares: torch.Tensor, errors: dict[int, str]
) -> list[list[str]]:
    top = min(TOP, len(classes))
    rows = []
    for place, share in zip(places, shares, strict=True):
        values, indices = share.topk(top)
        pairs = [
            (classes[index], f"{value:.6f}") for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        ]
        rows.append([str(paths[place]), *pairs[0], *(cell for pair in pairs for cell in pair), ""])
    rows += [[str(paths[place]), "", "", *[""] * (2 * top), error] for place, error in errors.items()]
    return rows


def _show(rows: list[list[str]], top: int) -> None:
    table = Table("path", "class", "probability", f"next {min(2, top - 1)}", box=None, pad_edge=False)
    for row in rows[:SHOWN]:
        others = (
            ", ".join(f"{row[3 + 2 * i]} {float(row[4 + 2 * i]):.2f}" for i in range(1, min(3, top)))
            if not row[-1]
            else row[-1]
        )
        table.add_row(row[0], row[1], row[2][:5], others)
    Console().print(table)
    if len(rows) > SHOWN:
        log.info(f"... and {len(rows) - SHOWN} more")
