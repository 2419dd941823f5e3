"""From a trained model and a folder of images to their features: the work of src/embed.py."""

from __future__ import annotations

import logging
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from src.engine.commands.user_command import corrected
from src.engine.images.folders import list_images
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import make_folder, write_atomically, write_csv
from src.engine.runs.prediction import files_loader, in_the_way
from src.engine.runs.text import printable
from src.engine.runs.trained_model import TrainedModel

log = logging.getLogger(__name__)

ARRAYS = ("paths", "features")  # of an .npz
SHOWN = 8  # files that cannot be read


def embed(
    model: TrainedModel, images: Path, out: Path, batch_size: int, num_workers: int | None, timeout_seconds: float
) -> None:
    """Writes out, as .npz or .csv. Raises UserError for images that are not there or a file in the way."""
    check_out(out)
    paths = list_images(images)
    found: list[int] = []
    rows: list[torch.Tensor] = []
    unread: dict[int, str] = {}
    loader = files_loader(paths, model.card, batch_size, num_workers, timeout_seconds)
    for batch, places, errors in track(loader, "embedding", transient=True, disable=not sys.stderr.isatty()):
        unread |= errors
        if places:
            rows.append(model.features(batch).cpu())
            found += places
    if not rows:
        raise UserError(
            f"none of the {len(paths)} images can be read",
            where=str(images.absolute()),
            why=next(iter(unread.values())),
            fix=corrected("images=photos/"),
            code=ExitCode.DATA,
        )
    features = torch.cat(rows)[torch.tensor(found).argsort()]
    names = [str(paths[place]) for place in sorted(found)]
    if out.suffix == ".csv":
        header = ["path", *(f"feature_{number}" for number in range(features.shape[1]))]
        write_csv(out, header, [[name, *map(str, row)] for name, row in zip(names, features.numpy(), strict=True)])
    else:
        arrays = dict(zip(ARRAYS, (np.array(names), features.numpy()), strict=True))
        write_atomically(out, lambda file: np.savez(file, **arrays))
    for error in [*unread.values()][:SHOWN]:
        log.warning(error)
    note = f"; {len(unread)} files that cannot be read are left out" if unread else ""
    log.info(f"{printable(out)} has {features.shape[1]} features of {len(names)} images{note}")


def check_out(out: Path) -> None:
    """Raises UserError where nothing can be written, or where another program wrote the file."""
    if out.suffix not in (".npz", ".csv"):
        why = "the ending says how the features are written: arrays of numpy, or a table"
        raise in_the_way(out, "ends neither in .npz nor in .csv", why, out.with_name(f"{out.name}.npz"))
    if out.is_dir():
        raise in_the_way(out, "is a folder", "the features are written to a file", out / "features.npz")
    make_folder(out.parent, "out", out.name)
    if out.is_file() and out.stat().st_size and not _is_ours(out):
        other = out.with_name(f"{out.stem}-features{out.suffix}")
        raise in_the_way(out, "exists and was not written by src.embed", "it would be overwritten", other)


def _is_ours(out: Path) -> bool:
    if out.suffix == ".csv":
        with out.open("rb") as file:
            return file.readline(10**4).startswith(b"path,feature_0")
    try:
        with zipfile.ZipFile(out) as archive:
            return sorted(archive.namelist()) == sorted(f"{name}.npy" for name in ARRAYS)
    except (zipfile.BadZipFile, OSError):
        return False
