"""The exponential moving average of the weights, taken along with training (checkpoint.select=ema)."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(L.Callback):
    """Keeps decay * average + (1 - decay) * weights, step by step (Polyak and Juditsky, 1992). Training does not see it.

    It is part of the position that is saved, so that a continued run has the same average. Lightning's
    EMAWeightAveraging would validate, and choose the best epoch, with the average instead of the weights.
    """

    def __init__(self, decay: float) -> None:
        self.average: torch.nn.Module  # a copy of the network, with the averaged weights
        self._take_in = get_ema_multi_avg_fn(decay)
        self._step = self._taken_in = 0  # torch's AveragedModel counts on the GPU, and waits for it twice in every step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.average = copy.deepcopy(pl_module.network)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average.to(pl_module.device)
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # while gradients are accumulated
            return
        self._step, network = trainer.global_step, pl_module.network
        averaged = [tensor.detach() for tensor in self.average.parameters()]
        weights = [
            weight.detach().to(tensor.device) for weight, tensor in zip(network.parameters(), averaged, strict=True)
        ]
        if self._taken_in == 0:
            for tensor, weight in zip(averaged, weights, strict=True):
                tensor.copy_(weight)
        else:
            self._take_in(averaged, weights, self._taken_in)
        for kept, buffer in zip(self.average.buffers(), network.buffers(), strict=True):
            kept.copy_(buffer)
        self._taken_in += 1

    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged state_dict of the network; its BatchNorm statistics are those of the last step's weights."""
        return self.average.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """With the names that torch's AveragedModel gives them, as in older positions."""
        average = {f"module.{name}": tensor for name, tensor in self.average.state_dict().items()}
        return {"average": {"n_averaged": torch.tensor(self._taken_in)} | average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        average = dict(state_dict["average"])
        self._taken_in = int(average.pop("n_averaged"))
        self.average.load_state_dict({name.removeprefix("module."): tensor for name, tensor in average.items()})
