"""The exponential moving average of the weights, updated after every step (checkpoint.select=ema)."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(L.Callback):
    """Keeps decay * average + (1 - decay) * weights, step by step (Polyak and Juditsky, 1992). Training does not see it.

    It is part of the position that is saved, so that a continued run has the same average. Lightning's
    EMAWeightAveraging would validate, and choose the best epoch, by the average instead of the weights.
    """

    def __init__(self, decay: float) -> None:
        self.average: torch.nn.Module  # a copy of the network, with the averaged weights
        self._update = get_ema_multi_avg_fn(decay)
        self._num_averaged = 0  # torch's AveragedModel counts on the GPU, and waits for it twice in every step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.average = copy.deepcopy(pl_module.network)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        averaged = [tensor.detach() for tensor in self.average.parameters()]
        weights = [
            weight.detach().to(tensor.device)
            for weight, tensor in zip(pl_module.network.parameters(), averaged, strict=True)
        ]
        if self._num_averaged == 0:
            for tensor, weight in zip(averaged, weights, strict=True):
                tensor.copy_(weight)
        else:
            self._update(averaged, weights, self._num_averaged)
        for kept, buffer in zip(self.average.buffers(), pl_module.network.buffers(), strict=True):
            kept.copy_(buffer)
        self._num_averaged += 1

    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged state_dict of the network; its BatchNorm statistics are those of the last step's weights."""
        return self.average.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """With the names that torch's AveragedModel gives them, as in older positions."""
        average = {f"module.{name}": tensor for name, tensor in self.average.state_dict().items()}
        return {"average": {"n_averaged": torch.tensor(self._num_averaged)} | average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        average = dict(state_dict["average"])
        self._num_averaged = int(average.pop("n_averaged"))
        self.average.load_state_dict({name.removeprefix("module."): tensor for name, tensor in average.items()})
