"""What each callback adds to a training step, in microseconds, against a Trainer without it.

    python scripts/benchmarks/callback_overhead.py [rounds]         default: 7

One process, one thread: the Classifier with a small network (three blocks, 8x8 pixels) and with a ResNet18 (32x32 pixels),
batches of 4. In every round each variant trains one epoch; its result is the median time from the start of a step to the
start of the next. Prints the median over the rounds of the difference to the variant without callbacks.
"""

from __future__ import annotations

import gc
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
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from src.callbacks.freezing import FreezingSchedule
from src.config import Data, Optimizer
from src.data.module import ImageData
from src.engine.images.labelled_images import LabelledImages
from src.engine.memory.memory_log import MemoryLog
from src.engine.memory_growth.memory_growth import MemoryGrowth  # room: memory_growth
from src.engine.runs.checkpoint_selection import BestCheckpoint, WeightAverage
from src.engine.runs.position import PositionCheckpoint, StopOnSignal
from src.engine.runs.progress import Throughput
from src.engine.runs.writing import DurableCheckpointIO
from src.engine.steps.engine_module import Training
from src.engine.steps.metrics import SplitMetrics
from src.engine.steps.out_of_memory import OutOfMemory
from src.engine.weights.preprocessing import Preprocessing
from src.models.backbones import build_backbone
from src.models.classifier import Classifier
from src.models.freezing import FreezePlan
from src.models.losses import ClassificationLoss
from src.models.network import TransferNetwork
from src.tasks.multiclass import Multiclass

BATCH = 4


class StepTimes(L.Callback):
    """Seconds from the start of a step to the start of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.starts.append(time.perf_counter())

    def median_microseconds(self) -> float:
        return 1e6 * statistics.median(b - a for a, b in zip(self.starts[10:], self.starts[11:], strict=False))


def variants(folder: Path) -> dict[str, Callable[[], list[L.Callback]]]:
    position = PositionCheckpoint(folder)
    each = {
        "FreezingSchedule": lambda: FreezingSchedule(FreezePlan({0: ["head", "backbone"]}, 1)),
        "Throughput": Throughput,
        "OutOfMemory": lambda: OutOfMemory("split", 200),
        "MemoryLog": lambda: MemoryLog(folder / "memory.csv"),
        "MemoryGrowth": MemoryGrowth,  # room: memory_growth
        "BestCheckpoint": lambda: BestCheckpoint(folder, "val/acc"),
        "PositionCheckpoint": lambda: PositionCheckpoint(folder),
        "StopOnSignal": lambda: StopOnSignal(position),
        "WeightAverage (select=ema)": lambda: WeightAverage(0.99),
    }
    single = {name: lambda build=build: [build()] for name, build in each.items()}
    default = [build for name, build in each.items() if not name.startswith("WeightAverage")]
    return {"none": list, **single, "all that are on by default": lambda: [build() for build in default]}


def images(size: int, steps: int) -> LabelledImages:
    pixels = torch.zeros(3, size, size, dtype=torch.uint8)
    count = steps * BATCH
    splits = {"train": list(range(count)), "val": [0, 1], "test": []}
    names = [str(index) for index in range(count)]
    labels = [index % 2 for index in range(count)]
    return LabelledImages(("a", "b"), names, labels, splits, lambda index: pixels, in_memory=True)


def small_backbone() -> tuple[nn.Module, int]:
    def block(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    return nn.Sequential(block(3), block(8), block(8), nn.AdaptiveAvgPool2d(1)), 8


def step_time(
    build: Callable[[], tuple[nn.Module, int]], size: int, steps: int, callbacks: list[L.Callback], **options: Any
) -> float:
    """Median microseconds per step of an epoch. options: further arguments of Lightning's Trainer."""
    preprocessing = Preprocessing(size, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    backbone, features = build()
    model = Classifier(
        TransferNetwork(backbone, nn.Linear(features, 2), preprocessing),
        ClassificationLoss(),
        Optimizer(name="adamw", lr=1e-3),
        Training(total_steps=steps),
        *(SplitMetrics(Multiclass(), "ab", split) for split in ("train", "val")),
    )
    data = ImageData(Data(augment="none", batch_size=BATCH, num_workers=0), images(size, steps), preprocessing, seed=0)
    times = StepTimes()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        plugins=[DurableCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[times, *callbacks],
        **options,
    )
    trainer.fit(model, data)
    gc.collect()
    return times.median_microseconds()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    networks = {
        "small network": (small_backbone, 8, 150),
        "ResNet18": (lambda: build_backbone("resnet18", keep_classifier=False, image_size=32), 32, 50),
    }
    with tempfile.TemporaryDirectory() as folder:
        for title, (build, size, steps) in networks.items():
            measured: dict[str, list[float]] = {}
            for _ in range(rounds + 1):
                for name, callbacks in variants(Path(folder)).items():
                    measured.setdefault(name, []).append(step_time(build, size, steps, callbacks()))
            base = measured.pop("none")[1:]
            print(f"{title}: a step without callbacks takes {statistics.median(base):.0f} us")
            for name, times in measured.items():
                added = statistics.median(time - none for time, none in zip(times[1:], base, strict=True))
                print(f"  {name:30} {added:+8.0f} us  {100 * added / statistics.median(base):+6.2f} %")


if __name__ == "__main__":
    main()
