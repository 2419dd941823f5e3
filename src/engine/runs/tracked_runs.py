"""The run of Weights & Biases or MLflow that a run's folder belongs to: a continued run goes on in it. runs/NAME/tracking.json
keeps its id, and where it is: with another project or server a new one begins."""

from __future__ import annotations

import logging
import re
import secrets
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from src.engine.runs.files import write_json
from src.engine.runs.plain_values import read_json

log = logging.getLogger(__name__)

TRACKING = "tracking.json"


class OneMLFlowRun(MLFlowLogger):
    """MLflow refuses to change a parameter, such as the number of devices that a run goes on with: the first ones stay."""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        if not self.experiment.get_run(self.run_id).data.params:
            MLFlowLogger.log_hyperparams(self, params)


def wandb_logger(config: Any, folder: Path) -> WandbLogger:
    """config: the section logger."""
    chosen = kept_id(folder, "wandb", config.project) or secrets.token_hex(8)
    keep_id(folder, "wandb", config.project, chosen)
    return WandbLogger(folder.name, folder, project=config.project, offline=config.offline, id=chosen, resume="allow")


def mlflow_logger(config: Any, folder: Path) -> MLFlowLogger:
    """config: the section logger. Begins the run at once, whose id only the server knows."""
    uri = config.tracking_uri or f"sqlite:///{folder.parent.absolute()}/mlflow.db"
    where = f"{config.project} in {uri}"
    if kept := kept_id(folder, "mlflow", where):
        logger = OneMLFlowRun(config.project, run_name=folder.name, tracking_uri=uri, run_id=kept)
        try:
            logger.experiment.update_run(kept, "RUNNING")
            return logger
        except Exception as error:  # it was deleted; a server that does not answer ends the command below
            log.warning(f"The run {kept} of MLflow cannot be continued ({error}): a new one begins.")
    logger = OneMLFlowRun(config.project, run_name=folder.name, tracking_uri=uri)
    keep_id(folder, "mlflow", where, logger.run_id)
    return logger


def kept_id(folder: Path, kind: str, where: str) -> str | None:
    """The id of the folder's run, if it is there."""
    try:
        entry = read_json(folder / TRACKING).get(kind)
    except (OSError, ValueError):
        return None
    if not isinstance(entry, dict) or entry.get("where") != where:
        return None
    return entry["id"] if re.fullmatch(r"[\w-]{1,64}", str(entry.get("id"))) else None


@rank_zero_only
def keep_id(folder: Path, kind: str, where: str, chosen: str | None) -> None:
    try:
        entries = read_json(folder / TRACKING)
    except (OSError, ValueError):
        entries = {}
    write_json(folder / TRACKING, {**entries, kind: {"id": chosen, "where": where}})
