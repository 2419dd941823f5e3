"""Several models, or several views of an image, as one model: predict and evaluate use it as any other.

The probabilities are averaged, of task=regression the values (Lakshminarayanan et al., 2017, arXiv 1612.01474).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.task_kind import TaskKind

CROP = 7 / 8  # side of the five crops: 224 of 256 pixels, as is usual


class Ensemble(TrainedModel):
    """Its task and card are those of the first model; of thresholds, which are chosen on val, it has the mean."""

    def __init__(self, members: Sequence[TrainedModel], tta: str = "none") -> None:
        first = members[0]
        for member in members[1:]:
            _check_alike(first, member)
        self.members, self.tta = members, tta
        self.kind, self.device, self.folder = first.kind, first.device, first.folder
        for key in ("threshold", "thresholds"):
            if key in self.kind.values:
                rows = [member.kind.values[key] for member in members]
                self.kind.values[key] = tuple(sum(row) / len(row) for row in zip(*rows, strict=True))
        # Metrics and temperature are of the first alone, and its network divides by the temperature already.
        values = {key: row for key, row in self.kind.values.items() if key != "temperature"}
        self.card = replace(first.card, metrics={}, task_values=values)

    def words(self) -> list[str]:
        """What makes it another model than its first, as words of a command."""
        folders = [member.folder for member in self.members if member.folder]
        names = [folder.parent.name if folder.name == "model" else folder.name for folder in folders]
        mean = [f"run={'+'.join(names)}"] if len(names) > 1 else []
        return mean + ([f"tta={self.tta}"] if self.tta != "none" else [])

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> logits of the first model's task that stand for the mean of the answers."""
        views = _views(images, self.tta)
        answers = [member.kind.answers(member.logits(view)) for member in self.members for view in views]
        return self.kind.logits_of(torch.stack(answers).mean(0))

    def as_network(self) -> nn.Module:
        """The whole ensemble, for an export: uint8 (B, 3, S, S) -> logits float32 (B, outputs), as `logits` gives them."""
        assert self.tta == "none", "the mean of views is not exported"
        return _Mean([member.network for member in self.members], [member.kind for member in self.members])


class _Mean(nn.Module):
    def __init__(self, networks: Sequence[nn.Module], kinds: Sequence[TaskKind]) -> None:
        super().__init__()
        self.networks, self.kinds = nn.ModuleList(networks), kinds

    def forward(self, images: Tensor) -> Tensor:
        answers = [kind.answers(network(images)) for network, kind in zip(self.networks, self.kinds, strict=True)]
        return self.kinds[0].logits_of(torch.stack(answers).mean(0))


def combined(members: Sequence[TrainedModel], tta: str) -> TrainedModel:
    """One model of several and of several views. Raises UserError for models that do not go together."""
    return members[0] if len(members) == 1 and tta == "none" else Ensemble(members, tta)


def _views(images: Tensor, tta: str) -> list[Tensor]:
    if tta == "flip":
        return [images, images.flip(-1)]
    if tta == "five_crop":
        size = images.shape[-1]
        crops = functional.five_crop(images, [round(CROP * size)] * 2)
        return [functional.resize(crop, [size, size], antialias=True) for crop in crops]
    return [images]


def _check_alike(first: TrainedModel, other: TrainedModel) -> None:
    pairs = {
        "task": (first.card.task, other.card.task),
        "classes": (first.card.classes, other.card.classes),
        "preprocessing": (first.card.preprocessing, other.card.preprocessing),
        "way of reading images": (first.card.read_options, other.card.read_options),
        "kind of threshold": tuple(sorted({"threshold", "thresholds"} & {*m.kind.values}) for m in (first, other)),
    }
    for what, (one, another) in pairs.items():
        if one != another:
            raise UserError(
                f"{first.folder} and {other.folder} do not have the same {what}",
                why="the mean of their answers would say nothing: an ensemble is of models of the same images and classes",
                fix=corrected(f"run={first.folder.parent}", remove=["model"]) if first.folder else "",
                code=ExitCode.DATA,
            )
