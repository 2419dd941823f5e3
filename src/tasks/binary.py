"""task=binary: one of two classes, by one logit. task.positive and task.threshold choose what is called positive."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from src.engine.commands.suggestions import did_you_mean
from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import few, printable
from src.tasks.multiclass import Multiclass


class Binary(Multiclass):
    """The logit's sigmoid is the probability of the positive class, which is the second one.

    positive: its name; None: the last in alphabetical order. threshold: with this probability an image is called positive;
    None: 0.5.
    """

    def __init__(
        self,
        positive: str | None = None,
        threshold: float | None = None,
        values: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__(values)
        self.positive = positive
        if threshold is not None:
            self.values["threshold"] = (threshold,)

    @property
    def threshold(self) -> float:
        return self.values.get("threshold", (0.5,))[0]

    def check_values(self, names: Sequence[str]) -> None:
        given = self.values.get("threshold", (0.5,))
        if len(given) != 1 or not 0 <= given[0] <= 1:
            raise ValueError("the threshold is not a number from 0 to 1")

    def names(self, texts: Sequence[str], columns: Sequence[str] = (), known: Sequence[str] = ()) -> tuple[str, ...]:
        names = super().names(texts, columns, known)
        if len(names) != 2:
            raise UserError(
                f"task=binary, but the data has {len(names)} classes",
                where=few(names),
                why="a single logit tells two classes apart",
                fix=corrected("task=multiclass", remove=["task.positive", "task.threshold"]),
                code=ExitCode.DATA,
            )
        if self.positive is None:
            return names
        if self.positive not in names:
            close = difflib.get_close_matches(self.positive, names, n=1)
            raise UserError(
                f"task.positive={printable(self.positive)} is no class" + did_you_mean(*close),
                why=f"the classes are {few(names)}",
                fix=[corrected(f"task.positive={name}") for name in close or names],
                code=ExitCode.DATA,
            )
        return tuple(sorted(names, key=lambda name: name == self.positive))

    def outputs(self, names: Sequence[str]) -> int:
        return 1

    def predicted(self, logits: Tensor) -> Tensor:
        return (self.probabilities(logits)[:, 1] >= self.threshold).long()

    def probabilities(self, logits: Tensor) -> Tensor:
        positive = logits.float().sigmoid()
        return torch.cat([1 - positive, positive], 1)

    def logits_of(self, answers: Tensor) -> Tensor:
        return answers[:, 1:].logit(1e-7)

    def ranked(self, answers: Sequence[float]) -> list[int]:
        return [1, 0] if answers[1] >= self.threshold else [0, 1]

    def purpose(self, names: Sequence[str]) -> str:
        return f"says whether an image shows {names[1]} or {names[0]}"

    def reading(self, names: Sequence[str]) -> str:
        return f"one logit: its sigmoid is the probability of {names[1]}, which is predicted from {self.threshold:g} on"
