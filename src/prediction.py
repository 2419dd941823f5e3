"""From a model folder and a folder of images to predictions.csv: the work of src/predict.py."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import torch
from rich.cells import cell_len
from rich.progress import track
from torch.utils.data import Dataset

from src.checkpoints.model_folder import ModelCard, load_model
from src.cores import cpu_cores
from src.data import time_limit
from src.data.folders import list_images
from src.data.image_loader import LoaderSettings, image_loader
from src.data.oddities import other_bits
from src.data.reading import ImageError, read_with_findings
from src.data.sampler import PartSampler
from src.data.transforms import eval_transform
from src.errors import ExitCode, UserError
from src.files import make_folder, write_csv
from src.machine import choose_device
from src.models.building import rebuild
from src.models.losses import probabilities
from src.out_of_memory import InParts
from src.strategies.precision import autocast, usable_precision
from src.text import printable
from src.user_command import corrected

log = logging.getLogger(__name__)

TOP = 5
SHOWN = 10
LEAST_OF_A_PATH, MOST_OF_AN_ERROR = 24, 40  # columns; a longer error goes on in the next line
HEADER = b"path,class,probability,"  # how a file of predictions begins


def predict(
    model: Path,
    images: Path,
    out: Path,
    batch_size: int,
    accelerator: str,
    *,
    num_workers: int | None = None,
    timeout_seconds: float = time_limit.SECONDS,
) -> None:
    """Writes out (CSV) and shows its first rows. Raises UserError for a model or images that are not there."""
    card, state = load_model(model)
    paths = list_images(images)
    replaced = _try(out)
    device = choose_device(accelerator)
    precision = usable_precision(card.precision, device)
    forward = InParts(rebuild(card, state, model).to(device).eval())
    workers = num_workers if num_workers is not None else (cpu_cores() if len(paths) > 200 else 0)
    loader = image_loader(
        _Files(paths, card),
        PartSampler(len(paths), batch_size),
        LoaderSettings(batch_size, workers, timeout_seconds),
        card.preprocessing.image_size,
        collate=_collate,
    )
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
    note = f"; {len(bad)} of them are files that could not be read" if bad else ""
    note += "; it replaces the file that stood there" if replaced else ""
    log.info(f"{out} has {f'all {len(rows)} rows' if len(rows) > 1 else '1 row'}{note}")


def _try(out: Path) -> bool:
    """Makes the folder of the file and tries it, before the first image. Returns whether an earlier prediction is there.

    Raises UserError where nothing can be written, or where the file was written by somebody else.
    """
    if out.is_dir():
        raise UserError(
            f"out={printable(out)} is a folder",
            where=str(out.absolute()),
            why="the rows are written to a file",
            fix=corrected(f"out={out / 'predictions.csv'}"),
            code=ExitCode.CANNOT_WRITE,
        )
    if out.exists() and not out.is_file():  # a device or a pipe, such as /dev/stdout
        return False
    make_folder(out.parent, "out", out.name)
    if not out.exists():
        return False
    with out.open("rb") as file:
        if file.read(len(HEADER)) not in (HEADER, b""):
            raise UserError(
                f"out={printable(out)} exists and was not written by src.predict",
                where=str(out.absolute()),
                why="it would be overwritten",
                fix=corrected(f"out={out.with_name(out.stem + '-predictions.csv')}"),
                code=ExitCode.CANNOT_WRITE,
            )
    return True


class _Files(Dataset[tuple[int, torch.Tensor | str]]):
    """place -> (place, uint8 (3, S, S)) or (place, why the file cannot be read)."""

    def __init__(self, paths: list[Path], card: ModelCard) -> None:
        self.paths, self.options = paths, card.read_options
        self.transform = eval_transform(card.preprocessing)
        self.said = False

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, place: int) -> str:
        return str(self.paths[place])

    def __getitem__(self, place: int) -> tuple[int, torch.Tensor | str]:
        try:
            image, findings = read_with_findings(self.paths[place], self.options)
        except ImageError as error:
            return place, str(error)
        if not self.said and (odd := other_bits(findings.bits, self.options.bits)):
            self.said = True  # once a loader process
            log.warning(f"{printable(self.paths[place])}: {odd}")
        return place, self.transform(image)


def _collate(
    items: list[tuple[int, torch.Tensor | str]],
) -> tuple[torch.Tensor, list[int], dict[int, str]]:
    """The images that could be read as a batch, their places, and the errors of the others."""
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
    """The first rows as a table that fits the terminal; of a long path its end, where the file's name is."""
    header = ["path", "class", "probability", f"next {min(2, top - 1)}"]
    lines = [header] + [[printable(cell) for cell in _shown(row, top)] for row in rows[:SHOWN]]
    widths = [max(map(cell_len, column)) for column in zip(*(line[:3] for line in lines), strict=True)]
    others = max(min(cell_len(line[3]), MOST_OF_AN_ERROR) for line in lines)
    room = shutil.get_terminal_size((100, 0)).columns - widths[1] - widths[2] - others - 6
    widths[0] = min(widths[0], max(room, LEAST_OF_A_PATH))
    for line in lines:
        cells = [_end(line[0], widths[0]), *line[1:3]]
        padded = [cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
        log.info("  ".join([*padded, line[3]]).rstrip())
    if len(rows) > SHOWN:
        log.info(f"... and {len(rows) - SHOWN} more")


def _shown(row: list[str], top: int) -> list[str]:
    if row[-1]:
        return [row[0], "", "", row[-1].removeprefix(f"{printable(row[0])}: ")]
    others = [f"{row[3 + 2 * place]} {float(row[4 + 2 * place]):.2f}" for place in range(1, min(3, top))]
    return [row[0], row[1], f"{float(row[2]):.3f}", ", ".join(others)]


def _end(text: str, width: int) -> str:
    """The end of the text in so many columns of the terminal."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) >= width:
        text = text[1:]
    return f"…{text}"
