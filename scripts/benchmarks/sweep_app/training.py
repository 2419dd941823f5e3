"""A training of tens of milliseconds per epoch that reports every epoch to the sweep, if there is one."""

from __future__ import annotations

import logging
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from src.engine.runs import seeding
from src.engine.sweeps import trial

IMAGES, FEATURES, CLASSES, BATCH = 1024, 32, 4, 32


class SmallModel(L.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        features, labels = batch
        return nn.functional.cross_entropy(self.network(features), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        features, labels = batch
        self.log("accuracy", (self.network(features).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class Report(L.Callback):
    """After every validation."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (sweep := trial.current()) is not None:
            answer = sweep.report({"objective": accuracy(trainer), "epoch": trainer.current_epoch + 1})
            trainer.should_stop = answer != trial.GO_ON


def accuracy(trainer: L.Trainer) -> float:
    """Of the last validation."""
    return trainer.callback_metrics["accuracy"].item()


def train(lr: float, epochs: int) -> float:
    """Returns the accuracy after the last epoch."""
    torch.set_num_threads(1)  # a trial of Ray Tune does not see OMP_NUM_THREADS
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seeding.seed_everything("sweep app")
    features = torch.randn(IMAGES, FEATURES)
    labels = (features @ torch.randn(FEATURES, CLASSES)).argmax(1)
    batches = DataLoader(TensorDataset(features, labels), BATCH, shuffle=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[Report()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(SmallModel(lr), batches, batches)
    return accuracy(trainer)
