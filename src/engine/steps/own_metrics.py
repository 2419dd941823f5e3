"""Metrics of the owner's own: metrics=[src.my_metrics.Kappa] (docs/your_own.md)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric

from src.engine.commands.schema import METRICS
from src.engine.own import build_part, metric_name, owner_errors, wrong_result
from src.engine.steps.outputs import predicted_classes, probabilities


class OwnMetric(torch.nn.Module):
    """A torchmetrics.Metric whose update asks for predicted int64 (B,), probabilities (B, C) or logits, and labels."""

    def __init__(self, dotted_name: str, metric: Metric) -> None:
        super().__init__()
        self.dotted_name, self.metric = dotted_name, metric
        self.asks_for = tuple(inspect.signature(type(metric).update).parameters)[1:]

    def update(self, logits: torch.Tensor, labels: torch.Tensor, task: str) -> None:
        given = {"logits": lambda: logits, "labels": lambda: labels}
        given |= {
            "predicted": lambda: predicted_classes(logits, task),
            "probabilities": lambda: probabilities(logits, task),
        }
        with owner_errors("metrics", self.dotted_name):
            self.metric.update(**{name: given[name]() for name in self.asks_for})

    def states(self) -> dict[str, torch.Tensor]:
        """What it has summed up so far."""
        return {name: state for name, state in self.metric.metric_state.items() if isinstance(state, torch.Tensor)}

    def compute(self) -> float:
        with owner_errors("metrics", self.dotted_name):
            return float(self.metric.compute())


def own_metrics(entries: Sequence[Any], num_classes: int) -> dict[str, OwnMetric]:
    """By their names. entries: dotted names, or {_target_: a dotted name, argument: value}. Each may ask for num_classes.

    Also says of each whether more or less is better, for checkpoint.monitor. Raises UserError.
    """
    metrics = {}
    for entry in entries:
        options = dict(entry) if isinstance(entry, dict) else {"_target_": entry}
        name = options.pop("_target_")
        metric = build_part("metrics", name, {}, {"num_classes": num_classes}, options, Metric)
        own = OwnMetric(name, metric)
        if not own.asks_for or {*own.asks_for} - {"predicted", "probabilities", "logits", "labels"}:
            asked = f"an update that asks for {', '.join(own.asks_for) or 'nothing'}"
            raise wrong_result("metrics", name, "update(predicted, labels) or update(probabilities, labels)", asked)
        if own.states().keys() != metric.metric_state.keys():
            raise wrong_result(
                "metrics", name, "states that are tensors to be summed", "a list, which grows with the images"
            )
        metrics[metric_name(name)] = own
        METRICS[f"val/{metric_name(name)}"] = "min" if metric.higher_is_better is False else "max"
    return metrics
