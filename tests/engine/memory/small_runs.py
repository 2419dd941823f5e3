"""A training of the template's own module that takes seconds, for tests of what is measured of its memory."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from src.config import Data, Optimizer
from src.data.module import ImageData
from src.engine.images.labelled_images import LabelledImages
from src.engine.steps.engine_module import Training
from src.engine.weights.preprocessing import Preprocessing
from src.models.classifier import Classifier
from src.models.losses import ClassificationLoss
from src.models.network import TransferNetwork
from tests.engine.runs.small_training import metrics_of


def classifier(kind: type[Classifier] = Classifier) -> Classifier:
    """The template's own module, with a backbone of two convolutions, for images of 32 pixels in three classes."""
    torch.set_num_threads(1)
    backbone = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
    )
    network = TransferNetwork(backbone, nn.Linear(16, 3), Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3))
    optimizer = Optimizer(name="adamw", lr=1e-3, backbone_lr_scale=0.3, schedule="cosine")
    return kind(network, ClassificationLoss(), optimizer, Training(total_steps=1000), *metrics_of(3))


def image_data(steps: int, validation_steps: int, workers: int = 0) -> ImageData:
    train, val = 4 * steps, 4 * validation_steps
    indices = list(range(train + val))
    images = LabelledImages(
        ("a", "b", "c"),
        [f"image {index}" for index in indices],
        [index % 3 for index in indices],
        {"train": indices[:train], "val": indices[train:], "test": []},
        lambda index: torch.full((3, 40, 40), index % 256, dtype=torch.uint8),
    )
    preprocessing = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return ImageData(Data(batch_size=4, num_workers=workers, augment="light"), images, preprocessing, seed=0)


def fit(
    module: L.LightningModule,
    data: L.LightningDataModule,
    *callbacks: L.Callback,
    epochs: int = 1,
    logger: list | bool = False,
    accelerator: str = "cpu",
) -> L.Trainer:
    checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=epochs,
        callbacks=[*callbacks],
        logger=logger,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=10**9,
    )
    trainer.fit(module, data)
    return trainer
