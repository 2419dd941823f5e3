"""The LightningModule for transfer learning: a network, its loss, its metrics, its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from src import seeding
from src.config import Config, Optimizer
from src.data.labelled_images import LabelledImages
from src.data.module import shared_out
from src.data.sampler import PADDING
from src.models.building import build_loss
from src.models.losses import ClassificationLoss, predicted_classes, with_telling_gradient
from src.models.metrics import SplitMetrics
from src.models.network import TransferNetwork
from src.models.optimizers import build_optimizer, build_plateau, build_schedule, parameter_groups
from src.out_of_memory import InParts

Batch = tuple[torch.Tensor, torch.Tensor]  # images uint8 (B, 3, S, S), labels int64 (B,)


class _Counting(L.Callback):
    """A class of its own, since Lightning puts a module's callback in the place of the user's of the same class."""

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, torch.Tensor],
        batch: Batch,
        index: int,
    ) -> None:
        pl_module.count(outputs, batch)


class Classifier(L.LightningModule):
    """Trains a TransferNetwork.

    hparams: plain values that go into every checkpoint (the run's config, its classes), so that checkpoints load with
    weights_only=True. total_steps: of the whole run, for the schedule; given, not asked of the trainer, because asking
    makes the loaders too early to resume exactly (Lightning issue 20550). lr_decay: see optimizers.parameter_groups.
    monitor: the metric that schedule=plateau waits for.
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
        lr_decay: float | None = None,
        monitor: str = "val/acc",
    ) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.optimizer_config, self.total_steps, self.seed = optimizer, total_steps, seed
        self.lr_decay, self.monitor = lr_decay, monitor
        self.plateau: ReduceLROnPlateau | None = None
        self.train_metrics, self.val_metrics = SplitMetrics(num_classes), SplitMetrics(num_classes)
        self._part: float | torch.Tensor = 1.0  # of the batch in this process, times the number of processes
        self._counted: int | None = None  # how many of the batch's images are of its own; None: all
        self.step_counts = True  # False: src/callbacks/non_finite.py has left the step out
        self._decay_by_shape = False  # True where a run goes on that began so
        self._in_parts = InParts(self)  # for validation: in eval mode a batch in parts gives the same
        self.save_hyperparameters(hparams, logger=False)

    def setup(self, stage: str) -> None:
        for metrics in (self.train_metrics, self.val_metrics):
            metrics.share(shared_out(self.trainer)[1] > 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: uint8 (B, 3, S, S) -> logits (B, outputs)."""
        return self.network(images)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.step_counts = True
        rank, world = shared_out(self.trainer)
        seeding.seed_step(self.seed, self.trainer.fit_loop.total_batch_idx, rank)
        if world > 1:
            own, whole = self.trainer.datamodule.labels_of_batch(self.trainer.current_epoch, batch_idx)
            self._counted = len(own)
            self._part = world * self.loss.weight(own) / self.loss.weight(whole)

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of the processes are averaged, as if their parts of the batch were equal: they may differ by one."""
        (with_telling_gradient(loss) * self._part).backward()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        """loss: mean over the batch; predicted: classes (B,). A batch that does not fit is run in parts, each part through
        here (src/callbacks/out_of_memory.py), so nothing is counted before the batch is done."""
        loss, predicted = self._step(batch, self)
        return {"loss": loss, "predicted": predicted}

    def loss_weight(self, batch: Batch) -> torch.Tensor | int:
        """How much a part of a batch counts in its loss, for src/callbacks/out_of_memory.py."""
        return self.loss.weight(batch[1])

    def configure_callbacks(self) -> list[L.Callback]:
        """Lightning calls the module's own on_train_batch_end after those of the callbacks, which may save the position."""
        return [_Counting()]

    def count(self, outputs: dict[str, torch.Tensor], batch: Batch) -> None:
        if self.step_counts and self._counted != 0:
            predicted, labels = outputs["predicted"][: self._counted], batch[1][: self._counted]
            self.train_metrics.update(outputs["loss"], predicted, labels, self.loss.weight(labels))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if len(batch[1]) == 1 and batch[1][0] == PADDING:
            return
        loss, predicted = self._step(batch, self._in_parts)
        self.val_metrics.update(loss, predicted, batch[1], self.loss.weight(batch[1]))

    def _step(self, batch: Batch, forward: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = batch
        return self.compare(forward(images), labels)

    def compare(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (B, outputs) and labels (B,) -> the mean loss, and predicted classes (B,)."""
        return self.loss(logits, labels), predicted_classes(logits.detach(), self.loss.task)

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train", self.train_metrics)
        rates = {group["name"].removesuffix("/no_decay"): group["lr"] for group in self.optimizers().param_groups}
        parts = list(rates)
        ends = (parts[0], parts[-2], parts[-1])  # of the backbone the first and the last: the others lie between
        self.log_dict({f"lr/{part}": rates[part] for part in ends})

    def on_validation_epoch_end(self) -> None:
        values = self._log_epoch("val", self.val_metrics)
        if self.plateau is not None:
            self.plateau.step(values[self.monitor.removeprefix("val/")])

    def _log_epoch(self, split: str, metrics: SplitMetrics) -> dict[str, float]:
        values = metrics.compute()
        self.log_dict({f"{split}/{name}": value for name, value in values.items()})
        metrics.reset()
        return values

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not getattr(self.trainer.strategy, "runs_backward", False):  # see src/strategies/own_backward.py
            optimizer.zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The epoch's sums so far, of each process."""
        if "optimizer_states" in checkpoint:  # a position; the weights of the best epoch need none
            alone = shared_out(self.trainer)[1] == 1
            sums = self.train_metrics.sums()
            checkpoint["train_metrics"] = {
                name: values[None] if alone else self.all_gather(values) for name, values in sums.items()
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the epoch's sums. A run that began when weight decay also fell on tokens and position embeddings goes on
        with the groups that its optimizer's state was saved for. Lightning calls this before configure_optimizers."""
        if not checkpoint.get("optimizer_states"):
            return
        if "train_metrics" in checkpoint:  # positions of older runs have none
            self.train_metrics.resume(checkpoint["train_metrics"], *shared_out(self.trainer))
        saved = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
        groups = parameter_groups(self.network, self.optimizer_config, self.lr_decay)
        self._decay_by_shape = saved != [len(group["params"]) for group in groups]

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        optimizer = build_optimizer(self.network, self.optimizer_config, self.lr_decay, by_shape=self._decay_by_shape)
        schedule = build_schedule(optimizer, self.optimizer_config, self.total_steps)
        schedules: list[dict[str, Any]] = [{"scheduler": schedule, "interval": "step"}]
        if self.optimizer_config.schedule == "plateau":
            self.plateau = build_plateau(optimizer, self.monitor)
            schedules.append({"scheduler": self.plateau, "monitor": self.monitor})  # so that Lightning saves its state
        return [optimizer], schedules

    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any) -> None:
        """Lightning would step the plateau after it saved the epoch, and a continued run would miss that step: it is
        stepped in on_validation_epoch_end, which comes before."""
        if scheduler is not self.plateau:
            scheduler.step()


def build_classifier(
    config: Config, network: TransferNetwork, images: LabelledImages, total_steps: int, hparams: dict[str, Any]
) -> Classifier:
    """The LightningModule of a run."""
    return Classifier(
        network,
        build_loss(config, images.counts("train")),
        config.optimizer,
        num_classes=len(images.classes),
        total_steps=total_steps,
        seed=config.seed,
        hparams=hparams,
        lr_decay=config.freeze.lr_decay,
        monitor=config.checkpoint.monitor,
    )
