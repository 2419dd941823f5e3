"""Ends training where it was asked to end, with a validation: a run that stops in mid-epoch has a best epoch too."""

from __future__ import annotations

from typing import Any

import lightning as L


class StopAtMaxSteps(L.Callback):
    """Lightning's own max_steps leaves the epoch without validating, and a run that continues with it counts its epochs
    wrongly; should_stop validates first."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.global_step >= self.max_steps  # a run continued from its last step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True
