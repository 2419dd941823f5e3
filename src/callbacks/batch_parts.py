"""The pieces of src/callbacks/out_of_memory.py: a batch in parts, one output from those of the parts, the logs made once,
and what must be put back when an attempt failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from numbers import Number
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def split(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """The batch's tensors in parts of so many rows, in the tuples, lists or dicts that they are in."""
    if len(sizes) == 1:
        return [batch]
    return [_rows(batch, start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _rows(batch: Any, start: int, stop: int) -> Any:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[start:stop])


def shares_of_loss(module: L.LightningModule, parts: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """What the mean loss of each part contributes to that of the batch: floats or tensors that add up to 1."""
    if len(parts) == 1:
        return [1.0]
    weights = [module.loss_weight(part) for part in parts] if hasattr(module, "loss_weight") else sizes
    return [weight / sum(weights) for weight in weights]


def joined_result(outputs: Sequence[dict[str, Any]], shares: Sequence[Any], sizes: Sequence[int]) -> ClosureResult:
    """One output of training_step from those of the parts."""
    values = {name: [output[name] for output in outputs] for name in outputs[0]}
    loss = _joined(values.pop("loss"), shares)
    return ClosureResult(loss, {name: _joined(parts, sizes) for name, parts in values.items()})


def _joined(values: Sequence[Any], weights: Sequence[Any]) -> Any:
    """A batch's tensor from those of its parts; of single numbers the mean. Anything else is the same for all parts."""
    if len(values) == 1 or not isinstance(values[0], Tensor | Number):
        return values[-1]
    if isinstance(values[0], Tensor) and values[0].ndim > 0:
        return torch.cat(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


@dataclass
class Log:
    """One call of self.log in training_step."""

    name: str
    value: Any
    options: dict[str, Any]


@contextmanager
def recorded_logs(module: L.LightningModule) -> Iterator[list[Log]]:
    """Inside, calls of self.log and self.log_dict are kept instead of made: it is not known yet whether they count."""
    calls: list[Log] = []

    def log(name: str, value: Any, **options: Any) -> None:
        calls.append(Log(name, value.detach().squeeze() if isinstance(value, Tensor) else value, options))

    module.log = log
    try:
        yield calls
    finally:
        del module.log


def make_logs(module: L.LightningModule, logs: Sequence[list[Log]], sizes: Sequence[int]) -> None:
    """Makes the calls once that were recorded in each of the parts, with the means over the batch."""
    hook, module._current_fx_name = module._current_fx_name, "training_step"
    for calls in zip(*logs, strict=True):
        options = calls[0].options
        if options.get("batch_size") is not None:
            options["batch_size"] = sum(call.options["batch_size"] for call in calls)
        module.log(calls[0].name, _joined([call.value for call in calls], sizes), **options)
    module._current_fx_name = hook


class State:
    """What an attempt changes although it may fail: buffers, torch's random states, gradients accumulated so far.

    Only modules in training mode change their buffers, and it is known for an epoch which these are.
    """

    def __init__(self, module: L.LightningModule, device: torch.device) -> None:
        self.trains_batchnorm = any(isinstance(m, _BatchNorm) and m.training for m in module.modules())
        self._parameters = list(module.parameters())
        self._gradients: list[Tensor | None] | None = None
        self._generators = [(torch.get_rng_state, torch.set_rng_state)]
        if device.type == "cuda":  # of all GPUs: stages and replicas are on others
            self._generators.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
        elif device.type != "cpu":
            own = torch.get_device_module(device)
            self._generators.append((own.get_rng_state, own.set_rng_state))
        by_type: dict[torch.dtype, list[Tensor]] = {}  # one call copies all tensors of a type
        for buffer in [buffer for m in module.modules() if m.training for buffer in m.buffers(recurse=False)]:
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(buffers, [torch.empty_like(buffer) for buffer in buffers]) for buffers in by_type.values()]

    @torch.no_grad()
    def keep(self, gradients: bool) -> None:
        """gradients: whether there are some of earlier batches."""
        for buffers, kept in self._buffers:
            torch._foreach_copy_(kept, buffers)
        self._random = [get() for get, _ in self._generators]
        if gradients:
            self._gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for buffers, kept in self._buffers:
            torch._foreach_copy_(buffers, kept)
        for (_, put), state in zip(self._generators, self._random, strict=True):
            put(state)
        for parameter, kept in zip(self._parameters, self._gradients or [None] * len(self._parameters), strict=True):
            parameter.grad = None if kept is None else kept.clone()  # the next attempt adds to it, and may fail too

    def forget_gradients(self) -> None:
        self._gradients = None
