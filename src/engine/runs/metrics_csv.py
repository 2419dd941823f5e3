"""metrics.csv: one row per epoch, in every run, also after it was continued."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from src.engine.runs.files import rows_to_continue, write_csv

log = logging.getLogger(__name__)

FIRST_COLUMNS = ("epoch", "step", "train/loss", "train/acc", "val/loss", "val/acc")


class EpochRow(Checkpoint):
    """Writes an epoch's row before its position is saved: Lightning logs later, and a run killed in between would continue
    without the row. Must come before PositionCheckpoint in the list; Checkpoint callbacks come after all others."""

    def __init__(self, file: MetricsCsv) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.file.log_metrics(values | {"epoch": trainer.current_epoch}, trainer.global_step - 1)


class MetricsCsv(Logger):
    """Keeps the rows of an interrupted run, which Lightning's CSVLogger deletes.

    Values logged at the same optimizer step are one row: Lightning reports validation and training of an epoch separately.
    Epochs and steps are counted from 1, as on the screen; Lightning counts from 0.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {int(row["step"]): row for row in rows_to_continue(path)}

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = (step or 0) + 1
        values = {name: f"{value:.7g}" for name, value in metrics.items() if name != "epoch"}
        if "epoch" in metrics:
            values["epoch"] = str(int(metrics["epoch"]) + 1)
        row = self.rows.setdefault(step, {"step": step})
        if row | values != row:  # else EpochRow has written it
            row.update(values)
            self._write()

    def _write(self) -> None:
        rows = [self.rows[step] for step in sorted(self.rows)]
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        columns.sort(key=lambda name: (*FIRST_COLUMNS, name).index(name))  # the others stay in their order
        try:
            write_csv(self.path, columns, [[row.get(name, "") for name in columns] for row in rows])
        except OSError as error:  # the next write has all rows
            log.warning(f"{self.path} could not be written: {error.strerror}. Training goes on.")
