"""The training step of every run: what a module that users write need not contain.

One batch is one optimizer step, on Lightning's manual optimization. A subclass gives forward, mean_loss, loss_weight and
configure_optimizers (src/models/classifier.py); a strategy may change two places by methods of its own:

- compute(images) -> logits: DistributedDataParallel, replicas on several devices, stages in other processes;
- forward_backward(images, labels) -> (loss, logits): micro-batches that overlap, with their backward passes.

src/engine/steps/out_of_memory.py repeats forward_backward in smaller parts where memory runs out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from src.engine.feature_bank.loader import BankedLoader
from src.engine.images.image_loader import ImageLoader
from src.engine.images.sampler import is_padding, share_of
from src.engine.memory.out_of_memory import InParts
from src.engine.runs import seeding
from src.engine.runs.machine import one_thread
from src.engine.steps.mixing import Mix, MixedLabels

if TYPE_CHECKING:
    from src.engine.steps.metrics import SplitMetrics
    from src.engine.steps.network import Network

Labels = Tensor | MixedLabels  # int64 (B,) or float32 (B, names)
Batch = tuple[Tensor, Labels]  # images uint8 (B, 3, S, S), or their features (B, F)
Outputs = dict[str, Tensor]  # loss: mean over the batch; logits: (B, outputs), without gradients


class Repeater(Protocol):
    """Runs the step of a batch, in as many attempts as it takes."""

    def run(self, module: EngineModule, batch: Batch) -> Outputs: ...


@dataclass(frozen=True)
class Training:
    """How a module is trained.

    total_steps: of the whole run, for the schedule; given, not asked of the trainer, because asking makes the loaders too
    early to resume exactly (Lightning issue 20550). monitor: the metric that schedule=plateau waits for. gradient_clip:
    largest norm of the gradient. lr_decay: see optimizers.parameter_groups. mix: of a batch's images. hparams: plain values
    that go into every checkpoint (the run's config, its classes), so that checkpoints load with weights_only=True.
    """

    total_steps: int
    seed: int = 0
    monitor: str = "val/acc"
    gradient_clip: float | None = None
    lr_decay: float | None = None
    mix: Mix | None = None
    hparams: dict[str, Any] = field(default_factory=dict)


class EngineModule(L.LightningModule):
    """See above. train_metrics, val_metrics: updated with every batch, computed and logged after each epoch."""

    network: Network

    def __init__(self, training: Training, train_metrics: SplitMetrics, val_metrics: SplitMetrics) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.training_settings = training
        self.train_metrics, self.val_metrics = train_metrics, val_metrics
        self.repeater: Repeater | None = None  # set by src/engine/steps/out_of_memory.py
        self.step_counts = True  # False: src/engine/runs/non_finite.py has undone the step
        self.step_loss: Tensor  # of the current step, as soon as its gradients are there
        self.saved_group_sizes: list[int] | None = None  # parameters per optimizer group, in the position to continue
        # World size * this rank's share of the batch, so that DDP's mean over ranks is the mean over images.
        self._loss_scale: float | Tensor = 1.0
        self._num_own: int | None = None  # images of this rank, without duplicates added as padding; None: all
        self._in_parts = InParts(self.logits)  # for validation: in eval mode a batch in parts gives the same
        self.save_hyperparameters(training.hparams)  # loggers get them too

    # What a subclass gives

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, outputs), labels (B,) or (B, names) -> the mean loss."""
        raise NotImplementedError

    def loss_weight(self, labels: Tensor) -> Tensor | int:
        """What the mean loss over these labels is divided by."""
        return len(labels)

    # A training step

    def setup(self, stage: str) -> None:
        for metrics in (self.train_metrics, self.val_metrics):
            metrics.sync(share_of(self.trainer).world > 1)

    def teardown(self, stage: str) -> None:
        """Ends the loader processes, which would lie idle while the network is measured."""
        for loader in (self.trainer.train_dataloader, self.trainer.val_dataloaders):
            if isinstance(loader, ImageLoader | BankedLoader):
                loader.end()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Outputs:
        self.step_counts = True
        share = share_of(self.trainer)
        rank, world = share.rank, share.world
        seeding.seed_step(self.training_settings.seed, self.trainer.global_step, rank)
        if world > 1:
            own, whole = self._labels_of_batch(batch_idx)
            self._num_own = len(own)
            self._loss_scale = world * self.loss_weight(own) / self.loss_weight(whole)
        mix, step = self.training_settings.mix, self.trainer.global_step
        trained = batch if mix is None else mix(*batch, self.training_settings.seed, step, rank)
        with _enough_threads(batch[0]):
            if self.repeater is None:
                outputs = self.forward_backward([trained])
                self.update_weights(outputs)
            else:
                outputs = self.repeater.run(self, trained)
            self.count(outputs, batch[1])
        return outputs

    def forward_backward(self, parts: Sequence[Batch]) -> Outputs:
        """The gradients of a batch that is given in parts, one part after another in memory."""
        self.optimizer.zero_grad()
        by_strategy = getattr(self.trainer.strategy, "forward_backward", None)
        if by_strategy is not None:
            (batch,) = parts
            loss, logits = by_strategy(*batch)
            plugin = self.trainer.precision_plugin
            plugin.post_backward(plugin.pre_backward(loss, self), self)  # calls the hooks of a backward pass
            return {"loss": loss, "logits": logits}
        shares = self.shares_of_loss([labels for _, labels in parts])
        outcomes = [self._forward_backward(part, share) for part, share in zip(parts, shares, strict=True)]
        loss, logits = outcomes[0]
        if len(parts) > 1:
            losses = [loss * share for (loss, _), share in zip(outcomes, shares, strict=True)]
            loss = sum(losses, start=torch.zeros_like(loss)) / sum(shares)
            logits = torch.cat([logits for _, logits in outcomes])
        return {"loss": loss, "logits": logits}

    def shares_of_loss(self, parts: Sequence[Labels]) -> list[Any]:
        """What the mean loss of each part contributes to that of the batch. parts: their labels."""
        weights = [
            labels.weight(self.loss_weight) if isinstance(labels, MixedLabels) else self.loss_weight(labels)
            for labels in parts
        ]
        return [1.0] if len(parts) == 1 else [weight / sum(weights) for weight in weights]

    def _forward_backward(self, part: Batch, share: float | Tensor) -> tuple[Tensor, Tensor]:
        images, labels = part
        logits = self.logits(images)
        if isinstance(labels, MixedLabels):
            loss = labels.mean_loss(logits, self.mean_loss, self.loss_weight)
        else:
            loss = self.mean_loss(logits, labels)
        self.manual_backward(loss * share)
        return loss.detach(), logits.detach()

    def logits(self, images: Tensor) -> Tensor:
        """forward, the strategy's way."""
        return getattr(self.trainer.strategy, "compute", self)(images)

    def backward(self, loss: Tensor) -> None:
        """Called by manual_backward, inside the training step's autocast, which is for forward passes only."""
        with torch.autocast(loss.device.type, enabled=False):
            (with_telling_gradient(loss) * self._loss_scale).backward()

    def _labels_of_batch(self, batch_idx: int) -> tuple[Tensor, Tensor]:
        """The labels of this rank's share of a batch, which may be none, and those of the whole batch."""
        data: Any = getattr(self.trainer, "datamodule", None)
        return data.labels_of_batch(self.trainer.current_epoch, batch_idx)

    def update_weights(self, outputs: Outputs) -> None:
        """The optimizer's step and the schedule's."""
        self.step_loss = outputs["loss"]
        self.optimizer.step()
        for schedule in self.schedules():
            if not isinstance(schedule, ReduceLROnPlateau):
                schedule.step()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """With Lightning's step: it unscales, calls the hooks and counts in trainer.global_step."""
        return cast(torch.optim.Optimizer, self.optimizers())

    def schedules(self) -> list[LRScheduler]:
        """What configure_optimizers returned."""
        schedules = self.lr_schedulers()
        return schedules if isinstance(schedules, list) else [] if schedules is None else [schedules]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Here the gradients of fp16 are unscaled."""
        if self.training_settings.gradient_clip is not None:
            self.clip_gradients(optimizer, self.training_settings.gradient_clip, "norm")

    def count(self, outputs: Outputs, labels: Tensor) -> None:
        """Adds a step to the metrics of the epoch."""
        if self.step_counts and self._num_own != 0:
            logits, labels = outputs["logits"][: self._num_own], labels[: self._num_own]
            self.train_metrics.update(outputs["loss"], logits, labels, self.loss_weight(labels))

    # Validation, and the end of an epoch

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        if is_padding(labels):
            return
        with _enough_threads(images):
            logits = self._in_parts(images)
            self.val_metrics.update(self.mean_loss(logits, labels), logits, labels, self.loss_weight(labels))

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train", self.train_metrics)
        rates = {group["name"].removesuffix("/no_decay"): group["lr"] for group in self.optimizer.param_groups}
        parts = list(rates)
        ends = (parts[0], parts[-2], parts[-1])  # of the backbone the first and the last: the others lie between
        self.log_dict({f"lr/{part}": rates[part] for part in ends})

    def on_validation_epoch_end(self) -> None:
        """The plateau is stepped here, so that the position that is saved next has its step."""
        values = self._log_epoch("val", self.val_metrics)
        for schedule in self.schedules():
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(values[self.training_settings.monitor.removeprefix("val/")])

    def _log_epoch(self, split: str, metrics: SplitMetrics) -> dict[str, float]:
        values = metrics.compute()
        self.log_dict({f"{split}/{name}": value for name, value in values.items()})
        metrics.reset()
        return values

    # The position in training

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The epoch's sums so far, of each process."""
        if "optimizer_states" in checkpoint:  # a position; the weights of the best epoch need none
            alone = share_of(self.trainer).world == 1
            sums = self.train_metrics.sums()
            checkpoint["train_metrics"] = {
                name: values[None] if alone else self.all_gather(values) for name, values in sums.items()
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called before Lightning restores its loops, and before configure_optimizers."""
        if not checkpoint.get("optimizer_states"):
            return
        if "train_metrics" in checkpoint:  # positions of older runs have none
            share = share_of(self.trainer)
            self.train_metrics.resume(checkpoint["train_metrics"], share.rank, share.world)
        self.saved_group_sizes = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
        _count_steps_as_manual(checkpoint)


def _enough_threads(images: Tensor) -> AbstractContextManager[None]:
    """images: or their features (B, F)."""
    return one_thread() if images.ndim == 2 else nullcontext()


def with_telling_gradient(loss: Tensor) -> Tensor:
    """The same loss, to the bit. If it is nan or inf, all its gradients are nan and reach every process that averages them:
    otherwise a loss of inf may have finite gradients."""
    return loss * (1 + 0 * loss.detach())


def engine_module(module: L.LightningModule | None) -> EngineModule:
    """The module as what it is: Lightning's hooks and strategies are typed for any."""
    assert isinstance(module, EngineModule)
    return module


def _count_steps_as_manual(checkpoint: dict[str, Any]) -> None:
    """Positions of older versions have their steps in the counter of automatic optimization."""
    loop = checkpoint["loops"]["fit_loop"]
    manual = "epoch_loop.manual_optimization.optim_step_progress"
    if loop[manual]["total"]["completed"] == 0:
        loop[manual] = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]


def set_device(module: EngineModule, device: torch.device) -> None:
    """Sets module.device and moves all to it but the network."""
    network = module.network
    module.network = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    module.to(device)
    module.network = network
