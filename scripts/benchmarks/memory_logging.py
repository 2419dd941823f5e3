"""Cost of memory.log and memory.detect_growth: microseconds per training step, and the ratio of step times.

    python scripts/benchmarks/memory_logging.py [accelerator] [steps] [threads]         default: cpu 60 1

Trains all of a ResNet18 on 32 images of 64 pixels. One Trainer calls the callback in every second step; the medians of steps
with and without it are compared. Other programs disturb that ratio more than the callback does, so the CPU time of its hooks
is measured too, and shown as a share of the step. memory.log promises less than 1 %.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from src.engine.memory.memory_log import MemoryLog
from src.engine.memory_growth.memory_growth import MemoryGrowth  # room: memory_growth
from src.engine.weights.preprocessing import Preprocessing
from src.models.network import Architecture, build_network

BATCH, PIXELS, WARM_UP = 32, 64, 10


class EverySecondStep(L.Callback):
    """Calls another callback in odd steps only, and times steps and calls."""

    def __init__(self, measured: L.Callback) -> None:
        self.measured, self.on = measured, False
        self.steps: dict[bool, list[float]] = {False: [], True: []}  # seconds, without and with the callback
        self.hooks: list[float] = []  # seconds of CPU time, per step with it
        self._begin = self._spent = 0.0

    def _call(self, hook: str, *arguments: Any) -> None:
        if self.on:
            start = time.thread_time()
            getattr(self.measured, hook)(*arguments)
            self._spent += time.thread_time() - start

    def on_train_start(self, *arguments: Any) -> None:
        self.measured.on_train_start(*arguments)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.on, self._spent, self._begin = index % 2 == 1, 0.0, time.perf_counter()
        self._call("on_train_batch_start", trainer, pl_module, batch, index)

    def on_before_backward(self, *arguments: Any) -> None:
        self._call("on_before_backward", *arguments)

    def on_after_backward(self, *arguments: Any) -> None:
        self._call("on_after_backward", *arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self._call("on_train_batch_end", *arguments)
        if arguments[-1] >= WARM_UP:
            self.steps[self.on].append(time.perf_counter() - self._begin)
            self.hooks += [self._spent] if self.on else []


class Steps(L.LightningModule):
    """Plain training steps, without metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build_network(
            Architecture("resnet18", "linear", 10), Preprocessing(PIXELS, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def main() -> None:
    accelerator = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    steps, threads = (int(sys.argv[place]) if len(sys.argv) > place else value for place, value in ((2, 60), (3, 1)))
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    batch = torch.randint(0, 256, (BATCH, 3, PIXELS, PIXELS), dtype=torch.uint8), torch.randint(0, 10, (BATCH,))
    print(f"{accelerator}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {steps} steps")
    print(f"{'callback':14} {'ms without':>10} {'ms with':>8} {'ratio':>6} {'us in hooks':>12} {'of a step':>10}")
    kinds: list[Callable[[Path], L.Callback]] = [MemoryLog]
    kinds.append(lambda _: MemoryGrowth())  # room: memory_growth
    for make in kinds:
        with tempfile.TemporaryDirectory() as folder:
            measured = EverySecondStep(make(Path(folder) / "memory.csv"))
            trainer = L.Trainer(
                accelerator=accelerator, devices=1, max_epochs=1, callbacks=[measured], logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(Steps(), DataLoader([batch] * (2 * steps + WARM_UP), batch_size=None))
        without, with_it, hooks = map(statistics.median, (measured.steps[False], measured.steps[True], measured.hooks))
        name = type(measured.measured).__name__
        print(
            f"{name:14} {1e3 * without:10.2f} {1e3 * with_it:8.2f} {with_it / without:6.3f} "
            f"{1e6 * hooks:12.0f} {hooks / without:10.2%}"
        )


if __name__ == "__main__":
    main()
