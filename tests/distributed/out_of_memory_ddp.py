"""Two processes train with DDP, and one of them or both run out of memory: test_out_of_memory_ddp.py starts this file.

Writes to the file it is given, for each of the two, {scenario: what came of it}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from src.engine.processes.ddp import Ddp
from src.engine.runs.errors import UserError
from src.engine.steps.out_of_memory import OutOfMemory
from tests.engine.steps.little_memory import Small, fit, noise

LIMIT = 4

# name: (the ranks that fail, "forward" or "backward", in which batches, further settings)
SCENARIOS: dict[str, tuple[tuple[int, ...], str, range, dict[str, Any]]] = {
    "fits": ((), "backward", range(0), {}),
    "without the callback": ((), "backward", range(0), {"guarded": False}),
    "first forward, rank 1": ((1,), "forward", range(100), {}),
    "first backward, rank 1": ((1,), "backward", range(100), {}),
    "later forward, rank 0": ((0,), "forward", range(3, 100), {}),
    "later backward, rank 1": ((1,), "backward", range(3, 100), {"hold": True}),
    "both": ((0, 1), "backward", range(2, 100), {}),
    "fits again": ((1,), "backward", range(2, 3), {"grow_after": 2}),
    "BatchNorm": ((1,), "forward", range(1, 2), {"grow_after": 2, "batchnorm": True}),
}


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


class Watched(Small):
    """Notes which way each batch went."""

    def __init__(self, *words: Any, **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.ways: list[str] = []
        self.wrappers: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        self.left_over = 0  # wrappers that there were at the end of a batch in parts
        self.hold, self.held = False, []  # whether someone else refers to the wrapper

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        if self.trainer.strategy.wrapper is not None:
            self.wrappers.add(self.trainer.strategy.wrapper)
            if self.hold:
                self.held.append(self.trainer.strategy.wrapper)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        wrapped = self.trainer.strategy.wrapper is not None
        self.ways.append("DDP" if wrapped else "parts")
        if not wrapped:
            self.left_over = max(self.left_over, len(self.wrappers))


class OwnImages(L.LightningDataModule):
    """Each rank has images of its own; the last batch of rank 1 is smaller by one."""

    def __init__(self) -> None:
        super().__init__()
        self.images = [TensorDataset(*(tensor[of:] for tensor in noise(seed=of).tensors)) for of in (0, 1)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.images[rank()], batch_size=16)

    def labels_of_batch(self, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        first, second = (images.tensors[1][16 * batch : 16 * (batch + 1)] for images in self.images)
        return (second if rank() else first), torch.cat([first, second])


def train(fits: Callable[[int, int], bool], where: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One scenario in this process."""
    model = Watched(fits, where, batchnorm=settings.get("batchnorm", False))
    model.hold = settings.get("hold", False)
    callbacks = [OutOfMemory("split", settings.get("grow_after", 10**9))] if settings.get("guarded", True) else []
    trainer = fit(
        model,
        *callbacks,
        data=OwnImages(),
        max_epochs=2,
        devices=2,
        # With several buckets, of which some are sent before the backward pass fails.
        strategy=Ddp(20, bucket_cap_mb=1e-4),
    )
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist(),
        "steps": trainer.global_step,
        "attempts": model.attempts,
        "ways": model.ways,
        "left over": model.left_over,
    }


def refused() -> dict[str, Any]:
    """Not even one image fits in the memory of rank 1."""
    try:
        train(lambda images, batch: rank() == 0, "forward", {})
    except UserError as error:
        return {"code": error.code, "text": error.render()}
    return {}


def main(found: Path) -> None:
    torch.set_default_dtype(torch.float64)  # tests/tolerance.py
    gc.freeze()  # else the libraries' objects are searched for garbage after every failure
    gc.disable()  # nothing but what the callback does may free a wrapper
    mine = {}
    for name, (ranks, where, batches, settings) in SCENARIOS.items():
        fails = batches if rank() in ranks else range(0)
        mine[name] = train(lambda images, batch, fails=fails: images <= LIMIT or batch not in fails, where, settings)
    mine["one image"] = refused()
    every: list[Any] = [None, None]
    torch.distributed.all_gather_object(every, mine)
    if rank() == 0:
        found.write_text(json.dumps(every))
    torch.distributed.barrier()
    os._exit(0)  # threads of the wrappers that were held would abort one of ten processes as Python ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
