"""Trains: one command from images to a model folder.

    python -m src.train                                         1,797 digits, offline, under a minute on a CPU
    python -m src.train data=image_folder data.root=photos/     your own images: one folder per class
    python -m src.train model.backbone=resnet50 name=pets       repeat it with the same name and it continues
    python -m src.train -m optimizer.lr=1e-3,3e-3               a sweep: one run per value
    python -m src.train data.folds=5 name=cv                    cross-validation: five runs, each tested on another fifth
    python -m src.train --help                                  the groups and the keys

What happens in a run: src/run.py.
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from src import rules  # noqa: F401 (registers the settings)
from src.config import Config
from src.engine import features
from src.engine.commands import config_checks
from src.engine.commands.command_line import run_hydra
from src.engine.commands.user_command import corrected
from src.engine.processes import launching
from src.engine.processes.launch_checks import check_launched
from src.engine.runs import folds, run_dir
from src.engine.runs.errors import UserError, run_and_report
from src.engine.runs.imports import importing

log = logging.getLogger("src.train")  # __name__ is __main__


def train(composed: DictConfig) -> float:
    """One job: the composed config to a finished run. Returns the metric that chose the best epoch."""
    settings = config_checks.read(composed)
    hydra = HydraConfig.get()
    _check_multirun(hydra)
    check_launched(settings, multirun=hydra.mode == RunMode.MULTIRUN)
    if launching.launched_from_outside():
        signals.end_with(os.getppid())  # torchrun's agent, which may be killed itself
    if hydra.mode == RunMode.MULTIRUN:
        path = Path(os.path.relpath(hydra.runtime.output_dir))
        log.info(f"\njob {hydra.job.num}: {' '.join(hydra.overrides.task)}")
    elif folds.trains_all_folds(settings):
        return folds.train_folds(settings, train_run)
    else:
        path = launching.claim_path(settings)
    try:
        return train_run(settings, path)
    finally:
        if settings.name is None:
            with suppress(OSError):  # the folder that was made for the name's sake; one that holds anything stays
                path.rmdir()


def train_run(settings: Config, path: Path) -> float:
    """One run in its folder, in this process or in processes of its own."""
    if processes := launching.processes_to_start(settings):
        return launching.run_in_processes(settings, path, processes)

    with importing():  # after the command line is known to be right: torch takes seconds
        from src.run import run

    return run(settings, path)


def _check_multirun(hydra: HydraConf) -> None:
    """Raises UserError where a room's launcher or sweeper is chosen without -m, which would use it; hydra.mode=RUN, typed,
    means one run of a sweep's recipe."""
    choices = {part: hydra.runtime.choices[part] for part in ("hydra/launcher", "hydra/sweeper")}
    chosen = [f"{part}={choice}" for part, choice in choices.items() if choice in features.words(part)]
    if chosen and hydra.mode == RunMode.RUN and "hydra.mode=RUN" not in sys.argv:
        raise UserError(
            f"{chosen[0]} has no effect without -m",
            why="without it the command is one run, and not a sweep",
            fix=corrected("-m"),
        )


def main() -> int:
    return run_and_report(lambda: run_hydra(train), run_dir.opened)


if __name__ == "__main__":
    sys.exit(main())
