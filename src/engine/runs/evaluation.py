"""Measures a run's model again, or on other images: the work of src/evaluate.py."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.engine import features
from src.engine.commands.schema import Config, Data
from src.engine.commands.user_command import corrected
from src.engine.images.copies import seen_in_training
from src.engine.images.labelled_images import Label, LabelledImages, label_tensor
from src.engine.images.sources import ImageSources
from src.engine.images.table import read_csv
from src.engine.runs.bootstrap import metric_intervals
from src.engine.runs.ensemble import Ensemble
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import make_folder, write_json
from src.engine.runs.measuring import measure_split
from src.engine.runs.outputs import Outputs, write_predictions
from src.engine.runs.plain_values import read_json
from src.engine.runs.run_settings import merged, stored_settings
from src.engine.runs.tables import metrics_table
from src.engine.runs.text import few, printable
from src.engine.runs.trained_model import TrainedModel

log = logging.getLogger(__name__)

Changes = Mapping[str, Any]  # what the command changes of the run's settings: {"data.batch_size": 16}


@dataclass(frozen=True)
class Evaluation:
    """What the command asks for."""

    run: Path | None  # None: of a model/ folder without its run
    settings: Config  # the run's, or else the defaults, with the changes
    changes: Changes
    split: str | None  # None: test, or val where there is no test
    out: Path  # the folder for the numbers
    others: tuple[Path, ...] = ()  # further runs, of whose models and the first's the mean is measured


def evaluate_run(asked: Evaluation, model: TrainedModel, sources: ImageSources) -> None:
    """Prints the numbers and writes them to asked.out. Raises UserError."""
    run, settings, changes, out = asked.run, asked.settings, asked.changes, asked.out
    classes, kind = model.card.classes, model.kind
    make_folder(out, "out")
    images, data = _images_to_measure(asked, model, sources)
    settings = replace(settings, data=data)
    images = _with_names_of(model, images)
    split = _choose_split(asked.split, images)
    trained_on = _training_labels(run, model) if run and settings.data.class_weights != "none" else []
    loss = kind.loss(settings, classes, label_tensor(trained_on, images.labels[0]))

    def measure(images: LabelledImages) -> tuple[dict[str, dict[str, Any]], Outputs]:
        values, outputs = measure_split(model, images, split, settings, loss)
        sure = metric_intervals(kind, classes, outputs, values, settings.seed, outputs.groups(images))
        numbers = {"metrics": values, "intervals": sure}
        return {key: {f"{split}/{name}": x for name, x in row.items()} for key, row in numbers.items()}, outputs

    numbers, outputs = measure(images)
    changed = [f"{key}={value}" for key, value in changes.items()]
    changed += model.words() if isinstance(model, Ensemble) else []
    measured = [str(path) for path in (run or model.folder, *asked.others)]
    number = len(outputs.members)  # without those that broke since they were checked
    result: dict[str, Any] = {"run": " + ".join(measured), "changed": changed, "images": number, **numbers}
    result["intervals_by"] = None if images.groups is None else "group"
    seen = _seen([run, *asked.others] if run else [], images, split)
    if any(seen.values()):
        unseen = sorted(set(images.splits[split]).difference(*seen.values()))
        rest = replace(images, splits=images.splits | {split: unseen})
        result["seen_in_training"] = {part: len(members) for part, members in seen.items()}
        result["unseen"] = {"images": len(unseen), **(measure(rest)[0] if unseen else {"metrics": {}})}

    name, replaces = _name_of(out, f"evaluation_{split}", changes, changed)
    for file in (name, "evaluation"):  # a file per split and images, and the newest under a name that is always there
        write_json(out / f"{file}.json", result)
        kind.write(out / f"{file}_{kind.table}.csv", classes, outputs.kept(kind))
        write_predictions(out / f"{file}_predictions.csv", kind, images, outputs)
    _print(result, split, f"{number} {split} images {kind.counted(classes)}")
    tables = f"{name}_{kind.table}.csv, {name}_predictions.csv"
    log.info(f"files     {out / name}.json, {tables}{', which replace older ones' if replaces else ''}")


def _seen(runs: Sequence[Path], images: LabelledImages, split: str) -> dict[str, list[int]]:
    """Images of the split that one of the runs trained on, or else chose its best epoch by."""
    found = [seen_in_training(run, merged(stored_settings(run), {}), images, split) for run in runs]
    train = {index for each in found for index in each["train"]}
    return {"train": sorted(train), "val": sorted({index for each in found for index in each["val"]} - train)}


def _print(result: dict[str, Any], split: str, counts: str) -> None:
    log.info(f"{printable(result['run'])}: {counts}")
    log.info(metrics_table(result["metrics"], result["intervals"], result["intervals_by"]))
    if "unseen" not in result:
        return
    train, val = (result["seen_in_training"][part] for part in ("train", "val"))
    log.warning(
        f"{train + val} of these {result['images']} images are not new to the run: it trained on {train} of them and chose "
        f"its best epoch by {val}. The numbers above are too good."
    )
    if not result["unseen"]["images"]:
        log.warning("No other image is left to measure on.")
        return
    log.info(f"without them: {result['unseen']['images']} {split} images")
    log.info(metrics_table(result["unseen"]["metrics"], result["unseen"]["intervals"], result["intervals_by"]))


def _name_of(out: Path, name: str, changes: Changes, changed: list[str]) -> tuple[str, bool]:
    """The name of the files, without ending, and whether files of the same images have it already.

    Other images are named by their folder or table, or by what differs; where such a name is taken, by a number too.
    """
    keys = [key for key in ("data.root", "data.table", "data.split_file") if key in changes]
    different = Path(str(changes[keys[0]])).absolute().name if keys else "_".join(_which(changed)).replace("data.", "")
    if different:
        name += "_" + re.sub(r"[^\w.-]+", "_", printable(different))[:60]
    candidate, number = name, 1
    while (file := out / f"{candidate}.json").exists():
        with suppress(ValueError, AttributeError, TypeError):  # another program's file is left as it is
            if _which(read_json(file).get("changed", [])) == _which(changed):
                return candidate, True
        number += 1
        candidate = f"{name}-{number}"
    return candidate, False


def _which(changed: list[str]) -> list[str]:
    """The changes that choose images; a batch size does not."""
    return sorted(word for word in changed if not word.startswith(("data.batch_size=", "data.num_workers=")))


def _images_to_measure(asked: Evaluation, model: TrainedModel, sources: ImageSources) -> tuple[LabelledImages, Data]:
    """The run's own images in its own split, or the other ones that a change names, read alike; and how they are loaded."""
    run, settings, changes, kind = asked.run, asked.settings, asked.changes, model.kind
    columns = [*kind.columns(model.card.classes, settings.data.label_columns)]
    data = replace(settings.data, bits=model.card.bits, keep_side=model.card.keep_side, label_columns=columns)
    data = features.data_of_run(run, data) if run else data
    cache_dir = Path(settings.runs_dir) / ".checked"
    own_split = "data.split_file" not in changes
    if sources.lists_files(data, kind):
        if own_split and ("data.root" in changes or "data.table" in changes):
            return sources.load_unsplit(data, kind, cache_dir=cache_dir), data
        # The run's split lacks what it left out; what broke since then is said.
        data = replace(data, on_bad_image="skip")
    run_split = run / "split.csv" if run and own_split else None
    return sources.load_images(data, kind, settings.seed, cache_dir=cache_dir, run_split=run_split), data


def _training_labels(run: Path, model: TrainedModel) -> list[Label]:
    """Of the images that the run trained on: its class weights follow from them, with which other images are measured too."""
    rows = [row for _, row in read_csv(run / "split.csv", ("label", "split"), ours=True)]
    return model.kind.labels([row["label"] for row in rows if row["split"] == "train"], model.card.classes)


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


def _with_names_of(model: TrainedModel, images: LabelledImages) -> LabelledImages:
    """The images with the model's class numbers; folders in another order change nothing, unknown ones are an error."""
    classes, noun = model.card.classes, model.kind.noun
    unknown = [name for name in images.classes if name not in classes]
    if model.kind.in_order and not unknown and images.classes != classes:
        raise UserError(
            f"the values of these images are {few(images.classes)}, those of the model {few(classes)}",
            where=str(model.folder or "") + "/model.json",
            why="a label has its values in the order of these names",
            fix="have your source give them in the model's order",
            code=ExitCode.DATA,
        )
    if not unknown:
        texts = [images.label_text(index) for index in range(len(images.names))]
        return replace(images, classes=classes, labels=model.kind.labels(texts, classes))
    shown = []
    for name in unknown[:6]:
        close = difflib.get_close_matches(name, classes, n=1)
        shown.append(f"{printable(name)} (did it mean {printable(close[0])}?)" if close else printable(name))
    raise UserError(
        f"{len(unknown)} {noun} of these images are unknown to the model: {', '.join(shown)}",
        where=str(model.folder or "") + "/model.json",
        why=f"the model knows {', '.join(map(printable, classes[:12]))}{', ...' if len(classes) > 12 else ''}",
        fix=[
            f"rename them to the model's {noun}, or leave the unknown ones out",
            corrected(remove=["data.root", "data.table"]),
        ],
        code=ExitCode.DATA,
    )
