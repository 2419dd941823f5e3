"""A run that goes on from the checkpoint of another with other settings: a trial that scheduler=pbt made of a better one."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.optim.lr_scheduler import ReduceLROnPlateau


class OwnSettings(L.Callback):
    """Has optimizer.lr, weight_decay and momentum be those of this run's config.

    Lightning restores the state of optimizer and schedule from the checkpoint, and with it the settings that they had
    there. What was learnt (moments, the place in the schedule, steps of plateau) is kept. For a run that goes on from a
    checkpoint of its own nothing changes, not one bit.
    """

    def __init__(self) -> None:
        self._options: list[dict[str, Any]] = []  # of the optimizer's groups, as they were built

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the optimizer is built, before its state is restored."""
        (optimizer,) = trainer.optimizers
        self._options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in optimizer.param_groups
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        before = [group["initial_lr"] for group in optimizer.param_groups]
        for group, own in zip(optimizer.param_groups, self._options, strict=True):
            there, here = group["initial_lr"], own["initial_lr"]
            # lr * here / there would be rounded twice where the two are the same. Nothing is left of a factor on zero.
            group["lr"] = group["lr"] * (here / there) if there else here
            group |= own
        for scheduler in (one.scheduler for one in trainer.lr_scheduler_configs):
            if not isinstance(scheduler, ReduceLROnPlateau):  # which has none, and changes lr itself
                shares = [base / rate if rate else 1.0 for base, rate in zip(scheduler.base_lrs, before, strict=True)]
                # trainer.on_nan=restore may have reduced the base, but not what a group remembers of its beginning
                scheduler.base_lrs = [
                    own["initial_lr"] * share for own, share in zip(self._options, shares, strict=True)
                ]
