"""The LightningModule of transfer learning: network, loss, metrics, optimizer. Change it to train in another way.

Everything else about a training step is in src/engine/steps/engine_module.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.config import Config
from src.config import Optimizer as OptimizerConfig
from src.engine.own import build_part
from src.engine.steps.engine_module import EngineModule, Training
from src.engine.steps.metrics import SplitMetrics
from src.engine.steps.mixing import Mix
from src.engine.steps.task_kind import Loss
from src.models.network import TransferNetwork
from src.models.optimizers import build_optimizer, build_plateau, build_schedule
from src.task import Task


class Classifier(EngineModule):
    """Trains a TransferNetwork."""

    def __init__(
        self,
        network: TransferNetwork,
        loss: Loss,
        optimizer: OptimizerConfig,
        training: Training,
        train_metrics: SplitMetrics,
        val_metrics: SplitMetrics,
    ) -> None:
        super().__init__(training, train_metrics, val_metrics)
        self.network, self.loss, self.optimizer_config = network, loss, optimizer

    def forward(self, images: Tensor) -> Tensor:
        """images: uint8 (B, 3, S, S), or their features (B, F) -> logits (B, outputs)."""
        return self.network(images)

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, outputs), labels (B,) or (B, names) -> the mean loss."""
        return self.loss(logits, labels)

    def loss_weight(self, labels: Tensor) -> Tensor | int:
        """What the mean loss over these labels is divided by: the gradients of unequal parts are weighed with it."""
        return self.loss.weight(labels)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """Schedules are stepped after each step, ReduceLROnPlateau after each validation."""
        config, training = self.optimizer_config, self.training_settings
        optimizer = build_optimizer(self.network, config, training.lr_decay, self.saved_group_sizes)
        schedules: list[LRScheduler] = [build_schedule(optimizer, config, training.total_steps)]
        if config.schedule == "plateau":
            schedules.append(build_plateau(optimizer, training.monitor))
        return [optimizer], schedules


def build_classifier(config: Config, task: Task, total_steps: int, hparams: dict[str, Any]) -> Classifier:
    """The LightningModule of a run."""
    training = Training(
        total_steps=total_steps,
        seed=config.seed,
        monitor=config.checkpoint.monitor,
        gradient_clip=config.trainer.gradient_clip,
        lr_decay=config.freeze.lr_decay,
        mix=Mix.of(config.data.mix, config.data.mix_alpha),
        hparams=hparams,
    )
    names = task.images.classes
    train, val = (SplitMetrics(task.kind, names, split, config.metrics) for split in ("train", "val"))
    given = {"network": task.network, "loss": task.loss(config), "optimizer": config.optimizer, "training": training}
    given |= {"train_metrics": train, "val_metrics": val}
    model = config.model
    return build_part("model.module", model.module, {"classifier": Classifier}, given, model.module_options, Classifier)
