"""Applies the FreezePlan while Lightning trains. Why not Lightning's BackboneFinetuning: the table in docs/freezing.md."""

from __future__ import annotations

import logging

import lightning as L
import torch

from src.engine.processes.ddp import Ddp
from src.engine.steps.engine_module import engine_module
from src.engine.steps.step_snapshot import BATCHNORM
from src.models.freezing import FreezePlan

log = logging.getLogger(__name__)


class FreezingSchedule(L.Callback):
    """Applies the plan at the start of every epoch, and when training starts in the middle of one.

    momentum: of the backbone's BatchNorm. Weights that were trained for weeks come with 0.01 (TensorFlow's) or less; a
    fine-tuning of a few hundred steps would end with statistics of neither the old images nor the new.
    """

    def __init__(self, plan: FreezePlan, momentum: float = 0.1) -> None:
        self.plan, self.momentum = plan, momentum

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        network = engine_module(pl_module).network
        layers = [layer for layer in network.backbone.modules() if isinstance(layer, BATCHNORM)]
        for layer in layers:
            layer.momentum = self.momentum
        if self.plan.batchnorm == "keep" and not layers and trainer.is_global_zero:
            log.warning("freeze.batchnorm=keep has no effect: the backbone has no BatchNorm layers.")
        self.plan.apply(network, trainer.current_epoch)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.plan.apply(engine_module(pl_module).network, trainer.current_epoch):
            return
        if trainer.is_global_zero:
            names = [name.removeprefix("backbone.") for name in self.plan.trainable(trainer.current_epoch)]
            if len(names) > 6:
                names = [*names[:3], "...", names[-1]]
            log.info(f"from here on these learn: {', '.join(names)}")
        if isinstance(trainer.strategy, Ddp) and trainer.strategy.wrapper is not None:
            trainer.strategy.configure_ddp()
        if engine_module(pl_module).network.compiled:
            torch.compiler.reset()  # what was compiled for other trained blocks counts towards the limit of variants
        if pl_module.device.type == "cuda":
            # Activations have other sizes from here on: cached memory in pieces of the old sizes would be in the way.
            torch.cuda.empty_cache()
