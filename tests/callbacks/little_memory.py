"""A training of milliseconds on a machine whose memory is too small for most batches: errors are raised as torch does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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


class Small(L.LightningModule):
    """Convolution, BatchNorm and linear. BatchNorm is frozen, so that parts are exact, unless it is said to be trained.

    fits(count, batch): whether forward and backward of so many images work in this batch, counted from 0 over the whole
    run; where: "forward" or "backward", which of them fails.
    """

    def __init__(
        self,
        fits: Callable[[int, int], bool] = lambda count, batch: True,
        where: str = "backward",
        *,
        batchnorm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.convolution, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.dropout = nn.Dropout(dropout)
        if not batchnorm:
            self.norm.eval()
        self.fits, self.where = fits, where
        self.attempts: list[tuple[int, int]] = []  # (batch, count) of every call of training_step
        self.outputs: list[dict[str, Tensor]] = []  # what on_train_batch_end got
        self.activations: list[weakref.ref[Tensor]] = []
        self.hooks: list[str | None] = []  # what Lightning takes self.log to be called in, after each optimizer_step

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.convolution(images))
        self.activations.append(weakref.ref(features))
        if not self.fits(len(images), self.trainer.fit_loop.total_batch_idx):
            if self.where == "forward":
                raise torch.OutOfMemoryError(MESSAGE)
            features = FailInBackward.apply(features)
        return self.head(self.dropout(torch.relu(features).mean((2, 3))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        self.attempts.append((self.trainer.fit_loop.total_batch_idx, len(images)))
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(images))
        right = (logits.argmax(1) == labels).float().mean()
        self.log_dict({"acc": right.reshape(1), "rate": 0.01}, on_step=False, on_epoch=True)
        return {"loss": loss, "predicted": logits.argmax(1), "logits": logits, "right": right, "nothing": None}

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.hooks.append(self._current_fx_name)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


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
    data: TensorDataset | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> L.Trainer:
    """Trains for three epochs of batches of 16, 16, 16 and 6."""
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
    loader = DataLoader(data or noise(), batch_size=BATCHES[0])
    validation = loader if is_overridden("validation_step", model) else None
    trainer.fit(model, loader, validation, ckpt_path=resume, weights_only=True if resume else None)
    return trainer
