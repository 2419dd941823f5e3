"""predictions.csv in the folder of a fold's run: what it says about its test split, from which it has not learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from src.engine.feature_bank.bank import FeatureBank
from src.engine.images.loading import eval_loader, loader_settings
from src.engine.runs.files import write_csv
from src.engine.runs.job import Job
from src.engine.runs.task import RunTask


def write_predictions(job: Job, task: RunTask, bank: FeatureBank | None) -> None:
    """bank: the features of the network, where it has them."""
    model, images, kind, names = task.trained(job), task.images, task.kind, task.images.classes
    rows = [
        [images.names[index], str(job.config.data.fold), images.label_text(index), *kind.row(names, answers)]
        for batch, members in _batches(job, task, bank)
        for index, answers in zip(members, model.predict(batch).tolist(), strict=True)
    ]
    write_csv(job.folder.path / "predictions.csv", ["path", "fold", "label", *kind.header(names)], rows)


def _batches(job: Job, task: RunTask, bank: FeatureBank | None) -> Iterator[tuple[Tensor, list[int]]]:
    """Images or features, and their indices; without images that broke since they were checked."""
    images, size = task.images, job.config.data.batch_size
    if bank is not None:
        table = bank.table(images.splits["test"])
        known = [index for index in images.splits["test"] if table.has[index]]
        for start in range(0, len(known), size):
            yield table.rows[known[start : start + size]], known[start : start + size]
        return
    numbered = replace(images, labels=range(len(images.names)))  # so that the loader says which images it has read
    for batch, members in eval_loader(numbered, "test", task.preprocessing, loader_settings(job.config.data, images)):
        yield batch, members.tolist()
