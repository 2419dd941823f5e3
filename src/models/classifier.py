"""The LightningModule for transfer learning: a network, its loss, its metrics, its optimizer."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from src import seeding
from src.config import Config, Optimizer
from src.data.pictures import Pictures
from src.models.building import build_loss
from src.models.losses import ClassificationLoss, predicted_classes
from src.models.metrics import SplitMetrics
from src.models.network import TransferNetwork
from src.models.optimizers import build_optimizer, build_schedule

Batch = tuple[torch.Tensor, torch.Tensor]  # images uint8 (B, 3, S, S), labels int64 (B,)


class Classifier(L.LightningModule):
    """Trains a TransferNetwork.

    hparams: plain values that go into every checkpoint (the run's config, its classes), so that checkpoints load with
    weights_only=True. total_steps: of the whole run, for the schedule; given, not asked of the trainer, because asking
    makes the loaders too early to resume exactly (Lightning issue 20550).
    """

    def __init__(
        self,
        network: TransferNetwork,
        loss: ClassificationLoss,
        optimizer: Optimizer,
        *,
        num_classes: int,
        total_steps: int,
        seed: int,
        hparams: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.optimizer_config, self.total_steps, self.seed = optimizer, total_steps, seed
        self.train_metrics, self.val_metrics = SplitMetrics(num_classes), SplitMetrics(num_classes)
        self.save_hyperparameters(hparams, logger=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: uint8 (B, 3, S, S) -> logits (B, outputs)."""
        return self.network(images)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seeding.seed_step(self.seed, self.trainer.fit_loop.total_batch_idx, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        """loss: mean over the batch; predicted: classes (B,). A batch that does not fit is run in parts, each part through
        here (src/callbacks/out_of_memory.py), so nothing is counted before on_train_batch_end."""
        loss, predicted = self._step(batch)
        return {"loss": loss, "predicted": predicted}

    def on_train_batch_end(self, outputs: dict[str, torch.Tensor], batch: Batch, batch_idx: int) -> None:
        self.train_metrics.update(outputs["loss"], outputs["predicted"], batch[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, predicted = self._step(batch)
        self.val_metrics.update(loss, predicted, batch[1])

    def _step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = batch
        logits = self(images)
        return self.loss(logits, labels), predicted_classes(logits.detach(), self.loss.task)

    def on_train_epoch_end(self) -> None:
        rates = {group["name"]: group["lr"] for group in self.optimizers().param_groups if "/" not in group["name"]}
        self._log_epoch("train", self.train_metrics)
        self.log_dict({f"lr/{name}": lr for name, lr in rates.items()})

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val", self.val_metrics)

    def _log_epoch(self, split: str, metrics: SplitMetrics) -> None:
        self.log_dict({f"{split}/{name}": value for name, value in metrics.compute().items()})
        metrics.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.network, self.optimizer_config)
        schedule = build_schedule(optimizer, self.optimizer_config, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def build_classifier(
    config: Config, network: TransferNetwork, pictures: Pictures, total_steps: int, hparams: dict[str, Any]
) -> Classifier:
    """The LightningModule of a run."""
    return Classifier(
        network,
        build_loss(config, pictures),
        config.optimizer,
        num_classes=len(pictures.classes),
        total_steps=total_steps,
        seed=config.seed,
        hparams=hparams,
    )
