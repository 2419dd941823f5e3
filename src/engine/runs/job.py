"""A job: a run's config, its folder, its processes and the devices they compute on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from src.engine import features
from src.engine.commands.config_checks import without_effect
from src.engine.commands.schema import Config
from src.engine.memory.gpus import device_count
from src.engine.memory.ram import keep_freed_memory
from src.engine.processes.ranks import Ranks, joined, open_folder
from src.engine.runs import seeding
from src.engine.runs.epochs import typed_epochs
from src.engine.runs.loggers import Images, log_result
from src.engine.runs.machine import begin_peak, choose_devices, set_threads
from src.engine.runs.reading import newest_position
from src.engine.runs.run_dir import RunFolder
from src.engine.runs.shown import Shown
from src.engine.runs.tables import print_result
from src.engine.steps.compiling import check_compiler
from src.engine.steps.precision import check_precision

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Where and how a run computes, as one of its processes sees it. Of a run that is finished only `result` counts."""

    config: Config
    folder: RunFolder
    ranks: Ranks
    devices: tuple[torch.device, ...] = ()  # of this machine
    resume_point: Path | None = None  # the newest position that an earlier start saved
    peak_is_known: bool = False  # whether the peak of the memory is counted from this run's start
    result: dict[str, Any] | None = None  # result.json of a run that was finished already

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.devices[self.ranks.local_rank]

    @property
    def num_devices(self) -> int:
        """Over all machines."""
        return device_count(self.config.trainer) * self.config.trainer.num_nodes

    def finished(self) -> float | None:
        """The metric of a run that was finished already, whose result is shown once more; None for any other."""
        if self.result is None:
            return None
        log.info(f"{self.folder.path} is finished already; this is its result.")
        if self.ranks.is_first:
            if not (self.folder.path / "report.html").exists():
                report(self.folder, self.result)
            print_result(self.folder.path, self.result)
        value = self.result["metrics"].get(self.config.checkpoint.monitor)
        return math.nan if value is None else value


@contextmanager
def open_job(config: Config, path: Path) -> Iterator[Job]:
    """Inside, this process is one of the run's and the run's folder is open. Raises UserError."""
    warnings = without_effect(config)
    if config.debug:
        config = quick(config)
    with joined(config) as ranks, open_folder(ranks, path, asdict(config), config.resume) as folder:
        if (result := ranks.told_by_first(folder.result)) is not None:
            yield Job(config, folder, ranks, result=result)
            return
        for warning in warnings:
            log.warning(warning)
        devices = set_up_machine(config, ranks)
        if config.precision.name != "auto":
            check_precision(config.precision.name, devices[ranks.local_rank])
        if config.trainer.compile:
            check_compiler(devices[ranks.local_rank])
        peak_is_known = begin_peak(devices[ranks.local_rank])
        resume_point = ranks.after_first(lambda: newest_position(folder.checkpoints, typed_epochs(config)))
        yield Job(config, folder, ranks, tuple(devices), resume_point, peak_is_known)


def quick(config: Config) -> Config:
    """debug=true: three steps of every phase, one epoch each, so that a mistake anywhere shows in seconds."""
    phases = config.freeze.phases
    in_one_phase = config.freeze.preset in ("head_only", "full") or config.freeze.lora_rank
    starts = sorted(phases) if phases else ([0] if in_one_phase else [0, 1])
    return replace(
        config,
        trainer=replace(config.trainer, max_epochs=len(starts), limit_batches=3),
        freeze=replace(
            config.freeze,
            unfreeze_epoch=min(1, config.freeze.unfreeze_epoch),
            phases={epoch: phases[start] for epoch, start in enumerate(starts)} if phases else None,
        ),
    )


def set_up_machine(config: Config, ranks: Ranks) -> list[torch.device]:
    """Chooses this machine's devices, sets CPU threads and seeds."""
    devices = choose_devices(config.trainer.accelerator, config.trainer.devices)
    device = devices[ranks.local_rank]
    set_threads(config.trainer.threads, sharers=computing_at_once(config, devices))
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif config.memory.history:
        log.warning(f"memory.history=true has no effect on {device.type}: it is about an NVIDIA GPU's allocations.")
    seeding.seed_everything(config.seed)
    return devices


def computing_at_once(config: Config, devices: Sequence[torch.device]) -> int:
    """How many processes or threads of a run compute on this machine's CPU at the same time."""
    if features.process_per_device(config.strategy.name) or features.overlaps(config):
        return len(devices)
    return 1


def report(
    folder: RunFolder,
    result: dict[str, Any],
    phases: dict[int, list[str]] | None = None,
    shown: Shown | None = None,
    loggers: Sequence[Logger] = (),
) -> None:
    """Writes report.html, and gives the loggers the result with the page's plots. A page that cannot be made must not turn a
    run that is complete into a failed one."""
    plots: Images = {}
    for feature in features.FEATURES:
        try:
            if feature.run_report is not None and folder.config["report"]["page"]:
                plots = feature.run_report(folder.path, phases, result, shown)
        except Exception:
            log.warning(
                "report.html could not be written; train.log says why. The run itself is complete.", exc_info=True
            )
    log_result(loggers, folder, result, plots)
