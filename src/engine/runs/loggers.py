"""The loggers beside metrics.csv: TensorBoard, Weights & Biases, MLflow and the owner's, and what they get as a run ends.

Lightning gives them the metrics of every epoch, and as training begins the config (src/engine/steps/engine_module.py).
"""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import NAMES, original

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

    from src.engine.runs.run_dir import RunFolder

log = logging.getLogger(__name__)

Images = Mapping[str, Callable[[], bytes]]  # what a plot shows -> a function that draws it as a PNG
TABLES = ("confusion", "labels", "values")  # of results, in the run's folder


def check_loggers(config: Any) -> None:
    """Raises UserError for a logger that is not installed. config: the section logger."""
    for package in ("wandb", "mlflow"):
        if getattr(config, package) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"logger={package} needs the package {package}, which is not installed",
                why="it is an extra: an installation without it is smaller",
                fix=[
                    f'pip install -e ".[{package}]"',
                    corrected("logger=default", remove=["logger.project", "logger.offline", "logger.tracking_uri"]),
                ],
                code=ExitCode.UNAVAILABLE,
            )


def build_loggers(config: Any, folder: Path) -> list[Logger]:
    """config: the section logger. folder: the run's. Raises UserError."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from src.engine.runs.own_callbacks import own_logger
    from src.engine.runs.tracked_runs import mlflow_logger, wandb_logger

    check_loggers(config)
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False))
    if config.wandb:
        loggers.append(wandb_logger(config, folder))
    if config.mlflow:
        loggers.append(mlflow_logger(config, folder))
    return loggers + [own_logger(entry, folder) for entry in config.extra]


def log_result(loggers: Sequence[Logger], folder: RunFolder, result: dict[str, Any], images: Images) -> None:
    """Gives TensorBoard, Weights & Biases and MLflow the final numbers and the baseline's, the plots of the report, and the
    table of results. A logger that fails must not turn a run that is complete into a failed one."""
    if not loggers:
        return
    from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

    ways = {TensorBoardLogger: _to_tensorboard, WandbLogger: _to_wandb, MLFlowLogger: _to_mlflow}
    pngs: dict[str, bytes] = {}
    for logger in loggers:
        way = next((way for kind, way in ways.items() if isinstance(logger, kind)), None)
        if way is None:
            continue
        try:
            pngs = pngs or {name: draw() for name, draw in images.items()}
            way(logger, folder, result, pngs)
        except Exception as error:
            log.warning(f"{type(logger).__name__} did not take the result: {error}", exc_info=True)


def final_numbers(result: dict[str, Any]) -> dict[str, float]:
    """final/test/acc, and baseline/test/acc: names that no epoch has logged."""
    baseline = (result.get("baseline") or {}).get("metrics", {})
    named = [("final", result["metrics"]), ("baseline", baseline)]
    numbers = {f"{kind}/{name}": value for kind, metrics in named for name, value in metrics.items()}
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}


def _to_tensorboard(
    logger: TensorBoardLogger, folder: RunFolder, result: dict[str, Any], pngs: dict[str, bytes]
) -> None:
    import numpy as np

    logger.log_hyperparams(folder.config, final_numbers(result), result["steps"])
    for name, png in pngs.items():
        logger.experiment.add_image(f"report/{name}", np.asarray(_opened(png)), result["steps"], dataformats="HWC")
    logger.finalize("success")


def _to_wandb(logger: WandbLogger, folder: RunFolder, result: dict[str, Any], pngs: dict[str, bytes]) -> None:
    logger.log_hyperparams(folder.config)  # baseline=only has no training that would
    logger.log_metrics(final_numbers(result), result["steps"])
    for name, png in pngs.items():
        logger.log_image(f"report/{name}", [_opened(png)])
    for path in _tables(folder):
        with path.open(newline="", **NAMES) as lines:
            columns, *rows = ([original(cell) for cell in row] for row in csv.reader(lines))
        logger.log_table(path.stem, columns, rows)
    logger.experiment.finish()  # else the next job of a sweep in this process would log into the same run


def _to_mlflow(logger: MLFlowLogger, folder: RunFolder, result: dict[str, Any], pngs: dict[str, bytes]) -> None:
    logger.log_hyperparams(folder.config)
    logger.log_metrics(final_numbers(result), result["steps"])
    for name, png in pngs.items():
        logger.experiment.log_image(logger.run_id, _opened(png), f"report/{name}.png")
    for path in (*_tables(folder), folder.path / "report.html"):
        if path.exists():
            logger.experiment.log_artifact(logger.run_id, str(path))


def _tables(folder: RunFolder) -> list[Path]:
    return [path for name in TABLES if (path := folder.path / f"{name}.csv").exists()]


def _opened(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")
