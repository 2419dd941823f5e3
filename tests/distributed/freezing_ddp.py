"""Two processes train, first with Lightning's BackboneFinetuning, then with ours: test_freezing_ddp.py starts this file.

Writes {"stock": [...], "ours": [...]} to the file it is given, an entry per epoch: the hash of all weights on each rank,
and how many DistributedDataParallel wrappers there are.
"""

from __future__ import annotations

import hashlib
import json
import sys
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import DDPStrategy

from src.engine.processes.ddp import Ddp
from tests.engine.runs.small_training import Stock, classifier, fit, freezing


class Watch(L.Callback):
    """Looks at the end of every epoch: validation has just made the ranks' BatchNorm statistics equal."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.wrappers: weakref.WeakSet = weakref.WeakSet()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = [tensor.numpy().tobytes() for tensor in pl_module.network.state_dict().values()]
        hashes = [""] * trainer.world_size
        torch.distributed.all_gather_object(hashes, hashlib.sha256(b"".join(weights)).hexdigest())
        self.wrappers.add(getattr(trainer.strategy, "wrapper", trainer.strategy.model))
        self.seen.append({"hashes": hashes, "wrappers": len(self.wrappers)})


def train(model: L.LightningModule, callback: L.Callback, strategy: DDPStrategy) -> list[dict[str, Any]]:
    watch = Watch()
    fit(model, 4, callback, watch, devices=2, strategy=strategy)
    return watch.seen


if __name__ == "__main__":
    seen = {
        "stock": train(
            Stock(),
            BackboneFinetuning(unfreeze_backbone_at_epoch=1),
            DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)),
        ),
        "ours": train(classifier(4), freezing(4, preset="gradual", last_n=2), Ddp(60)),
    }
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(seen))
