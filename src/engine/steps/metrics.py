"""The metrics of a split: the loss, those of the task, and the owner's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torchmetrics import Metric

from src.engine.steps.own_metrics import Asking, own_metrics
from src.engine.steps.task_kind import TaskKind


class PreciseSums(Metric):
    """Sums of float32; any order and division of what is added gives the same to about 1e-7.

    float32 sums would lose an image beside a million others, and Apple GPUs have no float64. So the rounding error of each
    addition is summed too (Knuth's TwoSum, The Art of Computer Programming 2, 4.2.2), without waiting for the device.
    """

    full_state_update = False
    sums: torch.Tensor  # float32 of the given shape
    rounded_off: torch.Tensor  # float32, the same shape: the rounding errors of the sums

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("rounded_off", torch.zeros(shape), dist_reduce_fx="sum")

    def add(self, added: torch.Tensor) -> None:
        total = self.sums + added
        arrived = total - self.sums  # of `added`
        self.rounded_off = self.rounded_off + ((self.sums - (total - arrived)) + (added - arrived))
        self.sums = total

    def totals(self) -> torch.Tensor:
        """float64, on the CPU."""
        return self.sums.cpu().double() + self.rounded_off.cpu().double()


class WeightedMean(PreciseSums):
    """Sums of value * weight, and of weight."""

    def __init__(self) -> None:
        super().__init__(2)

    def update(self, value: torch.Tensor, weight: torch.Tensor | float) -> None:
        weight = torch.as_tensor(weight, dtype=torch.float32, device=self.sums.device)
        self.add(torch.stack([value.float() * weight, weight]))

    def compute(self) -> torch.Tensor:
        """nan where nothing was added."""
        total = self.totals()
        return total[0] / total[1]


class SplitMetrics(torch.nn.Module):
    """Updated per batch and computed once per epoch: each `self.log` of Lightning costs 0.36 ms.

    names: of the task, such as its classes. own: the owner's metrics, as Config.metrics has them; those that are named raise
    UserError where they are not metrics.
    """

    def __init__(self, kind: TaskKind, names: Sequence[str], split: str = "train", own: Sequence[Any] = ()) -> None:
        super().__init__()
        self.loss, self.kind = WeightedMean(), kind
        self.asking = {"": Asking(kind.metrics(names, split), f"task={kind.name}"), **own_metrics(own, names)}
        for asking in self.asking.values():
            asking.refuse_what_lacks(kind, names)
        self._moved = torch.nn.ModuleList(self.asking.values())  # with the module, to its device

    def _metrics(self) -> list[Metric]:
        return [self.loss, *(asking.metric for asking in self.asking.values())]

    def sync(self, shared: bool) -> None:
        """Whether compute sums over all processes; not where each of them sees every image."""
        for metric in self._metrics():  # torchmetrics reads sync_on_compute only when a metric is made
            metric.distributed_available_fn = dist.is_initialized if shared else bool

    @torch.no_grad()
    def update(
        self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | float
    ) -> None:
        """loss: mean over the batch; weight: its divisor (Loss.weight), so that the loss of the split does not depend on how
        it is divided into batches. logits (B, outputs), labels int64 (B,) or float32 (B, names)."""
        self.loss.update(loss, weight)
        for asking in self.asking.values():
            asking.update(logits, labels, self.kind)

    def compute(self) -> dict[str, float]:
        """loss, and the metrics of the task and of the owner."""
        values = {"loss": float(self.loss.compute())}
        for name, asking in self.asking.items():
            values |= asking.compute(name)
        return values

    def reset(self) -> None:
        for metric in self._metrics():
            metric.reset()

    def _states(self) -> dict[str, tuple[Metric, str, torch.Tensor]]:
        """Key in a position -> metric, name of its state, what it has summed up. The task's have no prefix."""
        return {
            f"{name}.{key}".lstrip("."): (asking.metric, key, state)
            for name, asking in self.asking.items()
            for key, state in asking.states().items()
        }

    def sums(self) -> dict[str, torch.Tensor]:
        """The sums of this process since the last reset: a part of the position in training."""
        own = {key: state for key, (_, _, state) in self._states().items()}
        return {"loss": torch.stack([self.loss.sums, self.loss.rounded_off]), **own}

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
        for key, (metric, name, state) in self._states().items():
            if key in sums:
                setattr(metric, name, share(sums[key]).to(state.device))
