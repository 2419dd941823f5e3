"""A training of milliseconds with everything real but its size: the project's network, images, LightningModule and
freezing, on a backbone of three blocks."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from src.callbacks.freezing import FreezingSchedule
from src.config import Data, Freeze, Optimizer
from src.data.module import ImageData
from src.engine.images.labelled_images import LabelledImages
from src.engine.steps.engine_module import Training
from src.engine.steps.metrics import SplitMetrics
from src.engine.weights.preprocessing import Preprocessing
from src.models.classifier import Classifier
from src.models.freezing import FreezePlan
from src.models.losses import ClassificationLoss
from src.models.network import TransferNetwork
from src.tasks.multiclass import Multiclass

SQUARE = Preprocessing(8, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLASSES, WIDTH = 3, 8


def block(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())


class Backbone(nn.Module):
    """(B, 3, 8, 8) -> (B, 8). The dropout is in no block, as in most networks' classifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1, self.layer2 = block(3), block(WIDTH), block(WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer2(self.layer1(self.stem(images))).mean((2, 3)))


def network() -> TransferNetwork:
    """The same weights at every call."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return TransferNetwork(Backbone(), nn.Linear(WIDTH, CLASSES), SQUARE)


def images() -> LabelledImages:
    """20 to train on, 10 to validate on, whose mean brightness tells the class."""
    labels = [index % CLASSES for index in range(30)]
    noise = torch.randint(0, 100, (30, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = noise + 50 * torch.tensor(labels, dtype=torch.uint8)[:, None, None, None]
    splits = {"train": list(range(20)), "val": list(range(20, 30)), "test": []}
    names = [str(index) for index in range(30)]
    return LabelledImages(("a", "b", "c"), names, labels, splits, lambda index: pixels[index], in_memory=True)


def data() -> ImageData:
    """Four steps per epoch."""
    return ImageData(Data(augment="none", batch_size=5, num_workers=0), images(), SQUARE, seed=0)


def metrics_of(classes: int) -> list[SplitMetrics]:
    """Of train and of val."""
    names = [str(number) for number in range(classes)]
    return [SplitMetrics(Multiclass(), names, split) for split in ("train", "val")]


def classifier(
    epochs: int = 5,
    lr_decay: float | None = None,
    monitor: str = "val/acc",
    clip: float | None = None,
    **optimizer: Any,
) -> Classifier:
    config = Optimizer(**{"name": "adamw", "lr": 0.01} | optimizer)
    training = Training(total_steps=4 * epochs, monitor=monitor, gradient_clip=clip, lr_decay=lr_decay)
    return Classifier(network(), ClassificationLoss(), config, training, *metrics_of(CLASSES))


def plan(epochs: int = 5, **freeze: Any) -> FreezePlan:
    """The plan for freeze.* of the config."""
    return FreezePlan.of(Freeze(**freeze), Backbone(), epochs)


# Of a Trainer that prints and keeps nothing, and leaves batches to ImageData.
QUIET = {
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(
    model: L.LightningModule,
    epochs: int,
    *callbacks: L.Callback,
    resume: Any = None,
    module: ImageData | None = None,
    **settings: Any,
) -> L.Trainer:
    """Trains on the CPU and returns the trainer."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **QUIET,
        **settings,
    )
    trainer.fit(model, module or data(), ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def freezing(epochs: int = 5, **freeze: Any) -> FreezingSchedule:
    return FreezingSchedule(plan(epochs, **freeze))


class Stock(L.LightningModule):
    """The same network as Lightning's BackboneFinetuning wants it: the backbone at the top, only the head in the optimizer."""

    backbone = property(lambda self: self.network.backbone)

    def __init__(self, scheduler: Any = None) -> None:
        super().__init__()
        self.network, self.scheduler = network(), scheduler

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.network(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.network.head.parameters(), lr=0.1)
        return [optimizer], [self.scheduler(optimizer)] if self.scheduler else []
