"""memory.csv: the memory of every training step by phase; and the largest values of each epoch in metrics.csv.

On an NVIDIA GPU these are the peaks of the forward pass, the backward pass and the optimizer; on other devices the live
memory at their ends. docs/memory.md says how to read it.
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

from src.engine.images.sampler import share_of
from src.engine.memory.gpu_driver import Driver
from src.engine.memory.memory import MIB, Allocator, live_bytes, read_allocator
from src.engine.memory.ram import resident_bytes
from src.engine.runs.files import rows_to_continue, write_csv

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 200  # rows kept in memory between two writes
SUGGEST_BELOW = 0.60  # suggest a larger batch only if a step peaks below this share of the GPU
FILL_TO = 0.85  # the share that the suggested batch may use
REST = 200  # times as long as a reading takes until the next step is measured, outside of NVIDIA GPUs
LONGEST_REST = 1.0  # seconds: a reading may have waited for a busy core
FEWEST_STEPS = 10  # of an epoch with the suggested batch


class _CudaMeter:
    """Measures a step on an NVIDIA GPU; resets the allocator's peak at every phase."""

    columns = (
        "allocated_mib",
        "live_allocations",
        "reserved_mib",
        "peak_mib",
        "forward_peak_mib",
        "backward_peak_mib",
        "optimizer_peak_mib",
        "device_used_mib",
        "device_utilisation_percent",
        "other_processes_mib",
    )
    logged = tuple(name for name in columns if name.endswith(("allocated_mib", "reserved_mib", "peak_mib", "percent")))

    def __init__(self, device: torch.device) -> None:
        self.device, self.driver, self.highest = device, Driver(device), 0

    def begin(self) -> dict[str, float]:
        """Called before the forward pass."""
        allocator = self._read()
        return {"allocated_mib": allocator.allocated / MIB, "live_allocations": allocator.allocations}

    def end_of(self, phase: str) -> dict[str, float]:
        allocator = self._read()
        peak = allocator.peak / MIB
        return {f"{phase}_peak_mib": peak, "peak_mib": peak, "reserved_mib": allocator.reserved / MIB}

    def end(self) -> dict[str, float]:
        """Called after the step."""
        reading = self.driver.read()
        return {
            "device_used_mib": _mib(reading.used),
            "device_utilisation_percent": math.nan if reading.utilisation is None else reading.utilisation,
            "other_processes_mib": _mib(reading.other_processes),
        }

    def _read(self) -> Allocator:
        allocator = read_allocator(self.device)
        self.highest = max(self.highest, allocator.peak)
        torch.cuda.reset_peak_memory_stats(self.device)
        return allocator


class _LiveMeter:
    """Measures a step on a CPU or an Apple GPU, which keep no peaks: the live memory at the end of each phase.

    Of quick steps, those of a head on features, only some, so that the four readings of a step take 2 % of the time: malloc
    adds up what it gave out in a sixth of a millisecond, and in a whole one where a process has many threads, as a sweep's.
    """

    columns = ("live_mib", "rss_mib", "live_after_forward_mib", "live_after_backward_mib", "live_after_optimizer_mib")
    logged = columns[:3]

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.next, self.measures = 0.0, True

    def begin(self) -> dict[str, float]:
        self.measures = time.monotonic() >= self.next
        if not self.measures:
            return {}
        return {"live_mib": self._live(), "rss_mib": _mib(resident_bytes())}

    def end_of(self, phase: str) -> dict[str, float]:
        return {f"live_after_{phase}_mib": self._live()} if self.measures else {}

    def end(self) -> dict[str, float]:
        return {}

    def _live(self) -> float:
        begin = time.monotonic()
        live = _mib(live_bytes(self.device))
        now = time.monotonic()
        self.next = now + min(REST * (now - begin), LONGEST_REST)
        return live


class MemoryLog(L.Callback):
    """Writes memory.csv while a run trains, and logs memory/... once per epoch, the largest value of each kind.

    everything_trains_from: the first epoch of the last freezing phase. A batch size is suggested at its end, and not
    earlier, because frozen blocks need little memory.
    """

    def __init__(self, path: Path, everything_trains_from: int = 0) -> None:
        self.path, self.everything_trains_from = path, everything_trains_from
        self._meter: _CudaMeter | _LiveMeter  # made in on_train_start, so not where nothing is left to train
        self._of_gpu: _CudaMeter | None = None  # the same, on a GPU
        self._columns: list[str] = []
        self._step: dict[str, float] = {}
        self._rows = np.empty((0, 0))  # allocated before the epoch, or the log itself would look like growing memory
        self._filled = self._written = self._batch_size = 0

    @property
    def peak_mib(self) -> int | None:
        """The most that the run allocated on its GPU; None on other devices. torch's own peak was reset by _CudaMeter."""
        meter = self._of_gpu
        return None if meter is None else max(meter.highest, read_allocator(meter.device).peak) // MIB

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        self._of_gpu = _CudaMeter(device) if device.type == "cuda" else None
        self._meter = self._of_gpu or _LiveMeter(device)
        self._columns = ["step", "epoch", *self._meter.columns]
        if trainer.is_global_zero:
            self._columns = continue_csv(self.path, self._columns, trainer.global_step)
        self._begin_epoch(trainer)  # a run continued in mid-epoch has no on_train_epoch_start
        if trainer.is_global_zero:
            rows = [row for row in rows_to_continue(self.path) if int(row["epoch"]) == trainer.current_epoch + 1]
            for row in rows[: len(self._rows)]:
                self._rows[self._filled] = [float(row[name] or math.nan) for name in self._columns]
                self._filled = self._written = self._filled + 1

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: L.Trainer) -> None:
        self._rows = np.empty((int(trainer.num_training_batches), len(self._columns)))
        self._filled = self._written = self._batch_size = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = self._meter.begin()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self._note(self._meter.end_of("forward"))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(self._meter.end_of("backward"))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._note(self._meter.end_of("optimizer") | self._meter.end())
        self._step |= {"step": trainer.global_step, "epoch": trainer.current_epoch + 1}
        self._rows[self._filled] = [self._step.get(name, math.nan) for name in self._columns]
        self._batch_size = max(self._batch_size, len(batch[1]) * share_of(trainer).world)
        self._filled += 1
        if self._filled - self._written == ROWS_AT_ONCE:
            self._write()

    def _note(self, values: dict[str, float]) -> None:
        """Adds values of this step, the largest of each kind: a batch in parts has each phase several times."""
        for name, value in values.items():
            self._step[name] = max(value, self._step.get(name, value))

    @rank_zero_only
    def _write(self) -> None:
        if self._written == self._filled:
            return
        rows = self._rows[self._written : self._filled]
        lines = [
            ",".join("" if math.isnan(value) else f"{value:.10g}" for value in row) + "\n" for row in rows.round(3)
        ]
        whole = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write("".join(lines).encode())
        except OSError as error:  # a full disk: no part of these rows stays in the file
            with suppress(OSError):  # the disk may have become read-only
                os.truncate(self.path, whole)
            log.warning(f"{self.path} could not be written: {error.strerror}. Training goes on without these rows.")
        self._written = self._filled

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write()
        epoch = self._rows[: self._filled]
        values: dict[str, float] = {}
        for name in self._meter.logged:
            column = epoch[:, self._columns.index(name)]
            if not np.isnan(column).all():
                values[name] = float(np.nanmean(column) if name.endswith("_percent") else np.nanmax(column))
        pl_module.log_dict({f"memory/{name}": value for name, value in values.items()}, rank_zero_only=True)
        if isinstance(self._meter, _CudaMeter) and trainer.current_epoch == self.everything_trains_from:
            self._suggest(values["allocated_mib"], values["peak_mib"], int(trainer.num_training_batches))

    @rank_zero_only
    def _suggest(self, fixed_mib: float, peak_mib: float, steps: int) -> None:
        """Suggests a larger batch if most of the GPU is idle. The memory of other processes is not counted as idle."""
        free_mib = torch.cuda.mem_get_info(self._meter.device)[0] / MIB
        total_mib = free_mib + read_allocator(self._meter.device).reserved / MIB
        larger = batch_size_to_try(self._batch_size, fixed_mib, peak_mib, total_mib)
        if larger is not None and steps * self._batch_size >= FEWEST_STEPS * larger:
            log.info(
                f"memory    a step needs {peak_mib:.0f} of the {total_mib:.0f} MiB it could have; "
                f"data.batch_size={larger} would need about {FILL_TO:.0%} of them or less"
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rows reach the file before the position that follows them."""
        self._write()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._write()


def continue_csv(path: Path, columns: list[str], steps_done: int) -> list[str]:
    """Prepares the file for the rows after step `steps_done` and returns its columns; later rows are dropped.

    A run continued on another kind of device adds columns, whose cells are empty in the earlier rows.
    """
    rows = [row for row in rows_to_continue(path) if int(row["step"]) <= steps_done]
    header = list(dict.fromkeys([*(rows[0] if rows else ()), *columns]))
    write_csv(path, header, [[row.get(name, "") for name in header] for row in rows])
    return header


def batch_size_to_try(batch: int, fixed_mib: float, peak_mib: float, total_mib: float) -> int | None:
    """The largest power of two with which a step fills at most 85 % of the memory; None if it is no larger than the batch,
    or if 60 % are in use already.

    fixed_mib: allocated before the step (weights, gradients, optimizer state); the rest of the peak grows with the batch.
    """
    if peak_mib >= SUGGEST_BELOW * total_mib:
        return None
    per_image = (peak_mib - fixed_mib) / batch
    fitting = 2 ** math.floor(math.log2((FILL_TO * total_mib - fixed_mib) / per_image))
    return fitting if fitting > batch else None


def _mib(used: int | None) -> float:
    return math.nan if used is None else used / MIB
