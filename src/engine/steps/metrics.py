"""The metrics of a split: loss, accuracy, and two in which rare classes weigh as much as common ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from src.engine.steps.outputs import predicted_classes
from src.engine.steps.own_metrics import own_metrics


class WeightedMean(Metric):
    """Weighted mean; any order and division of the values gives the same to about 1e-7.

    float32 sums would lose an image beside a million others, and Apple GPUs have no float64. So the rounding error of each
    addition is summed too (Knuth's TwoSum, The Art of Computer Programming 2, 4.2.2), without waiting for the device.
    """

    full_state_update = False
    sums: torch.Tensor  # float32 (2,): of value * weight, and of weight
    rounded_off: torch.Tensor  # float32 (2,): the rounding errors of the sums

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2), dist_reduce_fx="sum")
        self.add_state("rounded_off", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, value: torch.Tensor, weight: torch.Tensor | float) -> None:
        weight = torch.as_tensor(weight, dtype=torch.float32, device=self.sums.device)
        added = torch.stack([value.float() * weight, weight])
        total = self.sums + added
        arrived = total - self.sums  # of `added`
        self.rounded_off = self.rounded_off + ((self.sums - (total - arrived)) + (added - arrived))
        self.sums = total

    def compute(self) -> torch.Tensor:
        """float64, on the CPU; nan where nothing was added."""
        total = self.sums.cpu().double() + self.rounded_off.cpu().double()
        return total[0] / total[1]


class ClassCounts(Metric):
    """Images per class: predicted correctly, predicted, true. A confusion matrix of 10,000 classes would fill 800 MB."""

    full_state_update = False
    counts: torch.Tensor  # int32 (3, C): correct, predicted, true

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(3, num_classes, dtype=torch.int32), dist_reduce_fx="sum")

    def update(self, predicted: torch.Tensor, labels: torch.Tensor) -> None:
        classes = self.counts.shape[1]
        right = (predicted == labels).int()
        places = torch.cat([labels, predicted + classes, labels + 2 * classes])
        added = torch.cat([right, torch.ones_like(right), torch.ones_like(right)])
        self.counts = self.counts.view(-1).index_add(0, places, added).view(3, classes)

    def compute(self) -> torch.Tensor:
        return self.counts


class SplitMetrics(torch.nn.Module):
    """Updated per batch and computed once per epoch: each `self.log` of Lightning costs 0.36 ms.

    own: the owner's metrics, as Config.metrics has them; those that are named raise UserError where they are not metrics.
    """

    def __init__(self, num_classes: int, task: str = "multiclass", own: Sequence[Any] = ()) -> None:
        super().__init__()
        self.loss, self.classes, self.task = WeightedMean(), ClassCounts(num_classes), task
        self.own = own_metrics(own, num_classes)
        self._own = torch.nn.ModuleDict(self.own)  # so that they move with the module

    def _metrics(self) -> list[Metric]:
        return [self.loss, self.classes, *(own.metric for own in self.own.values())]

    def sync(self, shared: bool) -> None:
        """Whether compute sums over all processes; not where each of them sees every image."""
        for metric in self._metrics():
            metric.sync_on_compute = shared

    @torch.no_grad()
    def update(
        self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | float
    ) -> None:
        """loss: mean over the batch; weight: its divisor (ClassificationLoss.weight), so that the loss of the split does not
        depend on how it is divided into batches. logits (B, outputs), labels int64 (B,)."""
        self.loss.update(loss, weight)
        self.classes.update(predicted_classes(logits, self.task), labels)
        for own in self.own.values():
            own.update(logits, labels, self.task)

    def compute(self) -> dict[str, float]:
        """loss, acc, balanced_acc (mean recall) and macro_f1, over the classes that occur among the labels; own metrics."""
        own = {name: own.compute() for name, own in self.own.items()}
        return {"loss": float(self.loss.compute()), **rates(self.classes.compute()), **own}

    def reset(self) -> None:
        for metric in self._metrics():
            metric.reset()

    def sums(self) -> dict[str, torch.Tensor]:
        """The sums of this process since the last reset: a part of the position in training."""
        own = {f"{name}.{key}": value for name, own in self.own.items() for key, value in own.states().items()}
        return {"loss": torch.stack([self.loss.sums, self.loss.rounded_off]), "classes": self.classes.counts, **own}

    def resume(self, sums: Mapping[str, torch.Tensor], rank: int, world: int) -> None:
        """sums: of all processes, stacked. Each takes its own; if their number has changed, the first takes all."""

        def share(values: torch.Tensor) -> torch.Tensor:
            return values[rank] if len(values) == world else (values.sum(0) * (rank == 0)).to(values.dtype)

        loss = sums["loss"]
        if len(loss) == world:
            loss = loss[rank]
        else:
            total = loss.double().sum((0, 1)) * (rank == 0)
            loss = torch.stack([total.float(), (total - total.float()).float()])
        self.loss.sums, self.loss.rounded_off = loss.to(self.loss.device)
        self.classes.counts = share(sums["classes"]).to(self.classes.device)
        for name, own in self.own.items():
            for key, value in own.states().items():
                if f"{name}.{key}" in sums:
                    setattr(own.metric, key, share(sums[f"{name}.{key}"]).to(value.device))


def rates(counts: torch.Tensor) -> dict[str, float]:
    """counts: (3, C) of ClassCounts. A class without an image counts in no mean."""
    correct, predicted, true = counts.cpu().double()  # Apple GPUs have no double
    present = true > 0
    recall = correct[present] / true[present]
    f1 = 2 * correct[present] / (true + predicted)[present]
    return {
        "acc": float(correct.sum() / true.sum().clamp(min=1)),
        "balanced_acc": float(recall.mean()) if present.any() else 0.0,
        "macro_f1": float(f1.mean()) if present.any() else 0.0,
    }
