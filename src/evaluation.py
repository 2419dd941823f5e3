"""Measures a network on a split: the numbers that train prints at its end and that evaluate prints again."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from src.batch_size_search import chosen_batch_size
from src.checkpoints.model_folder import load_model
from src.config import Config
from src.data.labelled_images import LabelledImages
from src.data.loading import eval_loader
from src.data.seen_in_training import seen_in_training
from src.data.sources import lists_files, load_images, load_unsplit, loader_settings
from src.data.table import read_csv
from src.errors import ExitCode, UserError
from src.files import make_folder, write_json
from src.machine import choose_device, set_threads
from src.models.building import build_loss, rebuild
from src.models.losses import ClassificationLoss, predicted_classes
from src.models.metrics import SplitMetrics
from src.models.network import TransferNetwork
from src.out_of_memory import InParts
from src.plain_values import read_json
from src.preprocessing import Preprocessing
from src.reporting.tables import metrics_table, write_confusion
from src.run_settings import merged, stored_settings
from src.strategies.precision import autocast, check_precision
from src.text import printable
from src.user_command import corrected

log = logging.getLogger(__name__)


@torch.inference_mode()
def logits_of(
    network: TransferNetwork, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device, precision: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(logits float32 (B, outputs), labels (B,)) of batches (images uint8 (B, 3, S, S), labels (B,)), on the device."""
    network.to(device).eval()
    forward = InParts(network)
    for images, labels in batches:
        with autocast(precision, device):
            logits = forward(images.to(device, non_blocking=True))
        yield logits.float(), labels.to(device)


def evaluate(
    network: TransferNetwork,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    loss: ClassificationLoss,
    num_classes: int,
    device: torch.device,
    precision: str,
) -> tuple[dict[str, float], torch.Tensor]:
    """loss, acc, balanced_acc and macro_f1 over the batches, and what was taken for what: int64 (K, 3), a true class, a
    predicted class and how many images, of each pair that occurred."""
    metrics, loss = SplitMetrics(num_classes).to(device), loss.to(device).eval()
    pairs: list[torch.Tensor] = []
    batches = track(batches, "measuring", transient=True, disable=not sys.stdout.isatty())
    for logits, labels in logits_of(network, batches, device, precision):
        predicted = predicted_classes(logits, loss.task)
        metrics.update(loss(logits, labels), predicted, labels, loss.weight(labels))
        pairs.append(torch.stack([labels, predicted], 1))
    if not sum(map(len, pairs)):
        raise UserError(
            "none of the images to measure on can be read any more",
            why="they could be when they were checked; the lines above name them",
            fix="mend the files, then repeat the command",
            code=ExitCode.DATA,
        )
    pairs, counts = torch.cat(pairs).cpu().unique(dim=0, return_counts=True)
    return metrics.compute(), torch.cat([pairs, counts[:, None]], 1)


def measure_split(
    config: Config,
    network: TransferNetwork,
    images: LabelledImages,
    split: str,
    preprocessing: Preprocessing,
    device: torch.device,
) -> tuple[dict[str, float], torch.Tensor]:
    """What `evaluate` returns, for a split of a run's images."""
    loader = eval_loader(images, split, preprocessing, loader_settings(config.data, images))
    loss = build_loss(config, images.counts("train"))
    return evaluate(network, loader, loss, len(images.classes), device, config.precision.name)


def evaluate_run(
    run: Path, settings: Config, changes: Mapping[str, Any], split: str | None, out: Path, accelerator: str
) -> None:
    """The work of src/evaluate.py. settings: the run's, with the changes ({"data.batch_size": 16}). Raises UserError."""
    if settings.data.batch_size == "auto":
        settings.data.batch_size = chosen_batch_size(run) or 32  # changes no number
    card, state = load_model(run / "model")
    make_folder(out, "out")
    settings.data.bits = card.bits  # other images are read as those that it was trained on
    images = _with_classes_of(card.classes, _images_to_measure(settings, run, changes), run)
    split = _choose_split(split, images)
    device = choose_device(accelerator)
    check_precision(settings.precision.name, device)
    set_threads(settings.trainer.threads)

    network, precision = rebuild(card, state, run / "model"), settings.precision.name
    weighted = settings.data.class_weights != "none"
    loss = build_loss(settings, _training_counts(run, card.classes) if weighted else ())

    def measure(chosen: LabelledImages) -> tuple[dict[str, float], torch.Tensor]:
        loader = eval_loader(chosen, split, card.preprocessing, loader_settings(settings.data, chosen))
        values, confusion = evaluate(network, loader, loss, len(card.classes), device, precision)
        return {f"{split}/{name}": value for name, value in values.items()}, confusion

    metrics, confusion = measure(images)
    seen = seen_in_training(run, merged(stored_settings(run), {}), images, split)
    of_unseen = _of_unseen(images, split, seen, lambda chosen: measure(chosen)[0])
    number = int(confusion[:, 2].sum())  # without those that broke since they were checked
    changed = [f"{key}={value}" for key, value in changes.items()]
    measured = {"run": str(run), "changed": changed, "images": number, "metrics": metrics} | of_unseen
    name, replaced = _name_of(out, f"evaluation_{split}", changes, changed)
    # A file per split and images, and the newest of them under a name that is always there.
    for file in (name, "evaluation"):
        write_json(out / f"{file}.json", measured)
        write_confusion(out / f"{file}_confusion.csv", card.classes, confusion.tolist())
    log.info(f"{printable(run)}: {number} {split} images, {len(card.classes)} classes")
    log.info(metrics_table(metrics))
    _say_seen(of_unseen, split, number)
    log.info(f"files     {out / name}.json, {name}_confusion.csv{', which replace older ones' if replaced else ''}")


def _of_unseen(
    images: LabelledImages,
    split: str,
    seen: dict[str, list[int]],
    measure: Callable[[LabelledImages], dict[str, float]],
) -> dict[str, Any]:
    """For evaluation.json: how many images the run learned from, and the metrics of the others. {} where it saw none."""
    if not any(seen.values()):
        return {}
    rest = sorted(set(images.splits[split]) - {index for members in seen.values() for index in members})
    metrics = measure(replace(images, splits=images.splits | {split: rest})) if rest else {}
    return {
        "seen_in_training": {part: len(members) for part, members in seen.items()},
        "unseen": {"images": len(rest), "metrics": metrics},
    }


def _say_seen(of_unseen: dict[str, Any], split: str, number: int) -> None:
    if not of_unseen:
        return
    train, val = (of_unseen["seen_in_training"][part] for part in ("train", "val"))
    log.warning(
        f"{train + val} of these {number} images are not new to the run: it trained on {train} of them and chose its "
        f"best epoch by {val}. The numbers above are too good."
    )
    if not of_unseen["unseen"]["images"]:
        log.warning("No other image is left to measure on.")
        return
    log.info(f"without them: {of_unseen['unseen']['images']} {split} images")
    log.info(metrics_table(of_unseen["unseen"]["metrics"]))


def _name_of(out: Path, name: str, changes: Mapping[str, Any], changed: list[str]) -> tuple[str, bool]:
    """The name of the files, without ending, and whether they stand there already, made of the same images.

    Other images are named by their folder or table, or by what differs; those that share such a name get a number.
    """
    keys = [key for key in ("data.root", "data.table", "data.split_file") if key in changes]
    different = Path(str(changes[keys[0]])).absolute().name if keys else "_".join(_which(changed)).replace("data.", "")
    if different:
        name += "_" + re.sub(r"[^\w.-]+", "_", printable(different))[:60]
    for candidate in chain([name], (f"{name}-{number}" for number in count(2))):
        file = out / f"{candidate}.json"
        if not file.exists():
            return candidate, False
        with suppress(ValueError, AttributeError, TypeError):  # a file of somebody else is left as it is
            if _which(read_json(file).get("changed", [])) == _which(changed):
                return candidate, True
    raise AssertionError("numbers do not end")


def _which(changed: list[str]) -> list[str]:
    """The changes that choose images; a batch size does not."""
    return sorted(word for word in changed if not word.startswith(("data.batch_size=", "data.num_workers=")))


def _images_to_measure(settings: Config, run: Path, changes: Mapping[str, Any]) -> LabelledImages:
    """The run's own images in its own split, or the other ones that a change names."""
    cache_dir, data = Path(settings.runs_dir) / ".checked", settings.data
    own_split = "data.split_file" not in changes
    if lists_files(data):
        if own_split and ("data.root" in changes or "data.table" in changes):
            return load_unsplit(data, cache_dir=cache_dir)
        data.on_bad_image = "skip"  # what the run left out is not in its split; what broke since then is said
    return load_images(data, settings.seed, cache_dir=cache_dir, run_split=run / "split.csv" if own_split else None)


def _training_counts(run: Path, classes: Sequence[str]) -> list[int]:
    """How many images of each class the run trained on: its class weights, with which other images are measured too."""
    rows = [row for _, row in read_csv(run / "split.csv", ("label", "split"), ours=True)]
    counts = Counter(row["label"] for row in rows if row["split"] == "train")
    return [counts[name] for name in classes]


def _choose_split(split: str | None, images: LabelledImages) -> str:
    sizes = {name: len(members) for name, members in images.splits.items()}
    split = split or ("test" if sizes["test"] else "val")
    if not sizes.get(split):
        raise UserError(
            f"there is no image in the split {split}",
            why=f"there are {', '.join(f'{size} in {name}' for name, size in sizes.items() if size)}",
            fix=[corrected(f"split={name}") for name, size in sizes.items() if size],
            code=ExitCode.DATA,
        )
    return split


def _with_classes_of(classes: tuple[str, ...], images: LabelledImages, run: Path) -> LabelledImages:
    """The images with the model's class numbers; folders in another order change nothing, unknown ones are an error."""
    unknown = [name for name in images.classes if name not in classes]
    if not unknown:
        return images.in_order_of(classes)
    guesses = {name: difflib.get_close_matches(name, classes, n=1) for name in unknown}
    shown = [
        f"{printable(name)}{f' (did it mean {printable(guess[0])}?)' if guess else ''}"
        for name, guess in list(guesses.items())[:6]
    ]
    raise UserError(
        f"{len(unknown)} classes of these images are unknown to the model: {', '.join(shown)}",
        where=str(run / "model" / "model.json"),
        why=f"the model knows {', '.join(map(printable, classes[:12]))}{', ...' if len(classes) > 12 else ''}",
        fix=[
            "rename the folders to the model's classes, or leave the unknown ones out",
            corrected(remove=["data.root", "data.table"]),
        ],
        code=ExitCode.DATA,
    )
