"""Metrics that ask for what they measure: those of a task, and the owner's own, metrics=[src.my_metrics.Kappa]."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric

from src.engine.commands.schema import METRICS
from src.engine.own import build_part, metric_name, owner_errors, wrong_result
from src.engine.steps.task_kind import TaskKind


class Asking(torch.nn.Module):
    """A torchmetrics.Metric whose update names what it needs of predicted, probabilities, logits and labels. whose: the
    setting that it comes from, for messages."""

    def __init__(self, metric: Metric, whose: str) -> None:
        super().__init__()
        self.metric, self.whose = metric, whose
        self.asks_for = tuple(inspect.signature(type(metric).update).parameters)[1:]

    def given(self, logits: torch.Tensor, labels: torch.Tensor, kind: TaskKind) -> dict[str, torch.Tensor]:
        """What its update takes, by name."""
        known = {"logits": lambda: logits, "labels": lambda: labels}
        known |= {"predicted": lambda: kind.predicted(logits), "probabilities": lambda: kind.probabilities(logits)}
        return {name: known[name]() for name in self.asks_for}

    def update(self, logits: torch.Tensor, labels: torch.Tensor, kind: TaskKind) -> None:
        with owner_errors(*self.whose.split("=", 1)):
            self.metric.update(**self.given(logits, labels, kind))

    def refuse_what_lacks(self, kind: TaskKind, names: Sequence[str]) -> None:
        """Before the first image: a task without probabilities raises UserError."""
        if "probabilities" in self.asks_for:
            kind.probabilities(torch.zeros(1, kind.outputs(names)))

    def states(self) -> dict[str, torch.Tensor]:
        """What it has summed up so far."""
        return {name: state for name, state in self.metric.metric_state.items() if isinstance(state, torch.Tensor)}

    def compute(self, name: str) -> dict[str, float]:
        """Its numbers by their names; one that has no name of its own gets this one."""
        with owner_errors(*self.whose.split("=", 1)):
            found = self.metric.compute()
            return {key: float(value) for key, value in (found if isinstance(found, dict) else {name: found}).items()}


def own_metrics(entries: Sequence[Any], names: Sequence[str]) -> dict[str, Asking]:
    """By their names. entries: dotted names, or {_target_: a dotted name, argument: value}. Each may ask for num_classes.

    Also says of each whether more or less is better, for checkpoint.monitor. Raises UserError.
    """
    metrics = {}
    for entry in entries:
        options = dict(entry) if isinstance(entry, dict) else {"_target_": entry}
        name = options.pop("_target_")
        metric = build_part("metrics", name, {}, {"num_classes": len(names)}, options, Metric)
        own = Asking(metric, f"metrics={name}")
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
