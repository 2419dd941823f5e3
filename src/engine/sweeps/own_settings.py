"""A run that continues from the checkpoint of another run with other settings: what scheduler=pbt makes of a trial."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.optim.lr_scheduler import ReduceLROnPlateau

from src.engine.steps.engine_module import engine_module


class OwnSettings(L.Callback):
    """Keeps optimizer.lr, weight_decay and momentum of this run's config.

    Lightning restores optimizer and schedule from the checkpoint, and with them the settings of the run that wrote it. What
    was learnt (moments, the place in the schedule, steps of plateau) stays restored. A run that continues from a checkpoint
    of its own does not change, not one bit.
    """

    def __init__(self) -> None:
        self._options: list[dict[str, Any]] = []  # of the optimizer's groups, as they were built

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The optimizer is built, and its state not restored yet."""
        self._options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in engine_module(pl_module).optimizer.param_groups
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        groups = engine_module(pl_module).optimizer.param_groups
        restored = [group["initial_lr"] for group in groups]
        for group, options in zip(groups, self._options, strict=True):
            before, now = group["initial_lr"], options["initial_lr"]
            # lr * now / before would be rounded twice where the two are equal. Of lr 0 no factor is known.
            group["lr"] = group["lr"] * (now / before) if before else now
            group |= options
        for schedule in engine_module(pl_module).schedules():
            if not isinstance(schedule, ReduceLROnPlateau):  # which has no base, and changes lr itself
                # trainer.on_nan=restore may have reduced the base, but not a group's initial_lr
                factors = [base / lr if lr else 1.0 for base, lr in zip(schedule.base_lrs, restored, strict=True)]
                schedule.base_lrs = [
                    options["initial_lr"] * factor for options, factor in zip(self._options, factors, strict=True)
                ]
