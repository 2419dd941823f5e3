"""A training of milliseconds on a machine whose memory is too small for most batches: errors are raised as torch does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from src.engine.steps.engine_module import EngineModule, Training
from src.engine.steps.metrics import SplitMetrics
from src.models.losses import ClassificationLoss
from src.tasks.multiclass import Multiclass

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB."
BATCHES = (16, 16, 16, 6)  # of an epoch


class FailInBackward(torch.autograd.Function):
    """The identity, whose gradient does not fit."""

    @staticmethod
    def forward(context: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(MESSAGE)


class Small(EngineModule):
    """Convolution, BatchNorm and linear. BatchNorm is frozen, so that parts are exact, unless it is said to be trained.

    fits(count, batch): whether forward and backward of so many images work in this batch, counted from 0 over the whole
    run; where: "forward" or "backward", which of them fails. class_weights: of the loss, which is then no plain mean.
    """

    def __init__(
        self,
        fits: Callable[[int, int], bool] = lambda count, batch: True,
        where: str = "backward",
        *,
        batchnorm: bool = False,
        dropout: float = 0.0,
        class_weights: list[float] | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__(
            Training(total_steps=12, gradient_clip=clip),
            SplitMetrics(Multiclass(), "abcd"),
            SplitMetrics(Multiclass(), "abcd"),
        )
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.convolution, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.dropout = nn.Dropout(dropout)
        if not batchnorm:
            self.norm.eval()
        self.fits, self.where = fits, where
        self.loss = ClassificationLoss(class_weights)
        self.attempts: list[tuple[int, int]] = []  # (batch, count) of every forward pass in training
        self.outputs: list[dict[str, Tensor]] = []  # what on_train_batch_end got
        self.activations: list[weakref.ref[Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        batch = self.trainer.global_step
        self.attempts.append((batch, len(images)))
        features = self.norm(self.convolution(images))
        self.activations.append(weakref.ref(features))
        if not self.fits(len(images), batch):
            if self.where == "forward":
                raise torch.OutOfMemoryError(MESSAGE)
            features = FailInBackward.apply(features)
        return self.head(self.dropout(torch.relu(features).mean((2, 3))))

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss(logits, labels)

    def loss_weight(self, labels: Tensor) -> Tensor | int:
        return self.loss.weight(labels)

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.groups(), lr=0.01)

    def groups(self) -> list[dict[str, Any]]:
        backbone = [*self.convolution.parameters(), *self.norm.parameters()]
        return [
            {"params": backbone, "name": "backbone"},
            {"params": list(self.head.parameters()), "name": "head"},
        ]


def at_most(limit: int) -> Callable[[int, int], bool]:
    return lambda count, batch: count <= limit


def noise(size: int = 8, seed: int = 0) -> TensorDataset:
    """54 images of numbers around 0, of four classes."""
    numbers = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(BATCHES), 3, size, size, generator=numbers)
    return TensorDataset(images, torch.randint(0, 4, (sum(BATCHES),), generator=numbers))


def fit(
    model: L.LightningModule,
    *callbacks: L.Callback,
    data: TensorDataset | L.LightningDataModule | None = None,
    resume: Path | None = None,
    validate: bool = False,
    **settings: Any,
) -> L.Trainer:
    """Trains for three epochs of batches of 16, 16, 16 and 6. data: TensorDataset, or a LightningDataModule."""
    settings = {"enable_checkpointing": False, "max_epochs": 3, "accelerator": "cpu"} | settings
    trainer = L.Trainer(
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **settings,
    )
    if not isinstance(data, L.LightningDataModule):
        data = DataLoader(data or noise(), batch_size=BATCHES[0])
    trainer.fit(model, data, data if validate else None, ckpt_path=resume, weights_only=True if resume else None)
    return trainer
