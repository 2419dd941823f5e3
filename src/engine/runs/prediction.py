"""From a trained model and a folder of images to predictions.csv: the work of src/predict.py."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.cells import cell_len
from rich.progress import track
from torch.utils.data import Dataset

from src.engine.commands.user_command import corrected
from src.engine.images import time_limit
from src.engine.images.folders import list_images
from src.engine.images.image_loader import ImageLoader, LoaderSettings, image_loader
from src.engine.images.oddities import other_bits
from src.engine.images.reading import ImageError, read_with_findings
from src.engine.images.resizing import eval_transform
from src.engine.images.sampler import PartSampler
from src.engine.runs.cores import cpu_cores
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import make_folder, write_csv
from src.engine.runs.model_folder import ModelCard
from src.engine.runs.text import plural, printable
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.task_kind import TaskKind

log = logging.getLogger(__name__)

SHOWN = 10  # rows on the screen
MIN_PATH, MAX_ERROR = 24, 40  # columns of the screen; a longer error goes on in the next line
UNSURE = "unsure"
HEADER = b"path,"  # how a file of predictions begins; its first line ends with error


def choose_rows(kind: TaskKind, min_confidence: float | None, top_k: int | None) -> None:
    """How rows of predictions are written: answers of less confidence are marked, and only the top_k likeliest classes stand in
    one. Raises UserError for a task that has no such thing."""
    if min_confidence is not None and not kind.has_probabilities:
        why = "its answers are numbers without a probability"
        raise UserError("min_confidence= has no effect here", why=why, fix=corrected(remove=["min_confidence"]))
    if top_k is not None and kind.top is None:
        why = f"a row has all {kind.noun} of the model"
        raise UserError("top_k= has no effect here", why=why, fix=corrected(remove=["top_k"]))
    kind.min_confidence, kind.top = min_confidence, top_k or kind.top


def predict(
    model: TrainedModel,
    images: Path,
    out: Path,
    batch_size: int,
    *,
    num_workers: int | None = None,
    timeout_seconds: float = time_limit.SECONDS,
) -> None:
    """Writes out (CSV) and shows its first rows. Raises UserError for images that are not there or a file in the way."""
    paths = list_images(images)
    replaced = check_out(out)
    loader = files_loader(paths, model.card, batch_size, num_workers, timeout_seconds)
    kind, names = model.kind, model.card.classes
    least = kind.min_confidence
    header = [*kind.header(names), *([] if least is None else [UNSURE])]

    def marks(answers: list[float]) -> list[str]:
        return [] if least is None else [UNSURE if kind.confidence(answers) < least else ""]

    rows: list[list[str]] = []
    for batch, places, errors in track(loader, "predicting", transient=True, disable=not sys.stderr.isatty()):
        if places:
            for place, answers in zip(places, model.predict(batch).tolist(), strict=True):
                rows.append([str(paths[place]), *kind.row(names, answers), *marks(answers), ""])
        rows += [[str(paths[place]), *[""] * len(header), error] for place, error in errors.items()]
    rows.sort()
    write_csv(out, ["path", *header, "error"], rows)
    show(rows, ["path", *header, "error"], kind, names)
    if least is not None:
        unsure = sum(row[-2] == UNSURE for row in rows)
        log.info(f"unsure    {unsure} of {plural(len(rows), 'image')}, with a confidence below {least:g}")
    unread = sum(bool(row[-1]) for row in rows)
    note = f"; {unread} of them are files that could not be read" if unread else ""
    note += "; it replaces the file that stood there" if replaced else ""
    log.info(f"{out} has {f'all {len(rows)} rows' if len(rows) > 1 else '1 row'}{note}")


def files_loader(
    paths: list[Path], card: ModelCard, batch_size: int, num_workers: int | None, timeout_seconds: float
) -> ImageLoader:
    """Batches of the files' images, their places in `paths`, and the errors of those that cannot be read by place."""
    if num_workers is None:
        num_workers = cpu_cores() if len(paths) > 200 else 0
    settings = LoaderSettings(batch_size, num_workers, timeout_seconds)
    sampler = PartSampler(len(paths), batch_size)
    return image_loader(ImageFiles(paths, card), sampler, settings, card.preprocessing.image_size, collate=_collate)


def check_out(out: Path) -> bool:
    """Makes the file's folder and tries to write there, before the first image. Returns whether the file holds an earlier
    prediction. Raises UserError where nothing can be written, or where another program wrote the file."""
    if out.is_dir():
        raise in_the_way(out, "is a folder", "the rows are written to a file", out / "predictions.csv")
    if out.exists() and not out.is_file():  # a device or a pipe, such as /dev/stdout
        return False
    make_folder(out.parent, "out", out.name)
    if not out.exists():
        return False
    with out.open("rb") as file:
        first = file.readline(10**6)
    if first and not (first.startswith(HEADER) and first.rstrip().endswith(b",error")):
        other = out.with_name(out.stem + "-predictions.csv")
        raise in_the_way(out, "exists and was not written by src.predict", "it would be overwritten", other)
    return True


def in_the_way(out: Path, what: str, why: str, other: Path) -> UserError:
    return UserError(
        f"out={printable(out)} {what}",
        where=str(out.absolute()),
        why=why,
        fix=corrected(f"out={other}"),
        code=ExitCode.CANNOT_WRITE,
    )


class ImageFiles(Dataset[tuple[int, torch.Tensor | str]]):
    """place -> (place, uint8 (3, S, S)) or (place, why the file cannot be read)."""

    def __init__(self, paths: list[Path], card: ModelCard) -> None:
        self.paths, self.options = paths, card.read_options
        self.transform = eval_transform(card.preprocessing)
        self.warned = False  # once in each loader process

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, place: int) -> str:
        return str(self.paths[place])

    def __getitem__(self, place: int) -> tuple[int, torch.Tensor | str]:
        try:
            image, findings = read_with_findings(self.paths[place], self.options)
        except ImageError as error:
            return place, str(error)
        if not self.warned and (odd := other_bits(findings.bits, self.options.bits)):
            self.warned = True
            log.warning(f"{printable(self.paths[place])}: {odd}")
        return place, self.transform(image)


def _collate(items: list[tuple[int, torch.Tensor | str]]) -> tuple[torch.Tensor, list[int], dict[int, str]]:
    """The images that could be read as a batch, their places, and the errors of the others by place."""
    images = {place: item for place, item in items if isinstance(item, torch.Tensor)}
    errors = {place: item for place, item in items if isinstance(item, str)}
    return torch.stack(list(images.values())) if images else torch.empty(0), list(images), errors


def show(rows: list[list[str]], header: list[str], kind: TaskKind, names: Sequence[str]) -> None:
    """The first rows as a table that fits the terminal; of a long path its end, where the file's name is."""
    lines = [[printable(cell) for cell in _cells(row, kind, names)] for row in [header, *rows[:SHOWN]]]
    widths = [max(map(cell_len, column)) for column in zip(*(line[:3] for line in lines), strict=True)]
    last = max(min(cell_len(line[3]), MAX_ERROR) for line in lines)
    room = shutil.get_terminal_size((100, 0)).columns - widths[1] - widths[2] - last - 6
    widths[0] = min(widths[0], max(room, MIN_PATH))
    for path, *others, end in lines:
        cells = [_shortened(path, widths[0]), *others]
        padded = [cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
        log.info("  ".join([*padded, end]).rstrip())
    if len(rows) > SHOWN:
        log.info(f"... and {len(rows) - SHOWN} more")


def _cells(row: list[str], kind: TaskKind, names: Sequence[str]) -> list[str]:
    """A row of the file, or its header, as the four cells of the table."""
    if row[-1] not in ("", "error"):
        return [row[0], "", "", row[-1].removeprefix(f"{printable(row[0])}: ")]
    first, *rest = kind.shown(names, row[1 : 1 + len(kind.header(names))])
    return [row[0], f"{first} ({UNSURE})" if row[-2] == UNSURE and row[-1] != "error" else first, *rest]


def _shortened(text: str, width: int) -> str:
    """At most so many columns of the terminal, from the text's end."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) >= width:
        text = text[1:]
    return f"…{text}"
