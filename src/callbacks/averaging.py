"""The exponential moving average of the weights, taken along with training (checkpoint.select=ema)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage(L.Callback):
    """Keeps decay * average + (1 - decay) * weights, step by step (Polyak and Juditsky, 1992). Training does not see it.

    It is part of the position that is saved, so that a continued run has the same average. Lightning's
    EMAWeightAveraging would validate, and choose the best epoch, with the average instead of the weights.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.model: AveragedModel
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.model = AveragedModel(pl_module.network, multi_avg_fn=get_ema_multi_avg_fn(self.decay))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.model.to(pl_module.device)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:  # not while gradients are accumulated
            self._step = trainer.global_step
            self.model.update_parameters(pl_module.network)

    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged state_dict of the network; its BatchNorm statistics are those of the start."""
        return self.model.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.model.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.model.load_state_dict(state_dict["average"])
