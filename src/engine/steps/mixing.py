"""data.mix: images of a training batch that show two, each with the labels of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.engine.runs import seeding

ALPHAS = {"mixup": 0.2, "cutmix": 1.0}  # as in the papers: data.mix_alpha=null


@dataclass(frozen=True)
class Mix:
    """form: 'mixup', one image laid over another (Zhang et al., 2018, https://arxiv.org/abs/1710.09412), or 'cutmix', a piece
    of another in it (Yun et al., 2019, https://arxiv.org/abs/1905.04899). alpha: of the beta distribution of the shares.

    torchvision's MixUp and CutMix draw from the global generator, and their labels are classes only.
    """

    form: str
    alpha: float

    @classmethod
    def of(cls, form: str, alpha: float | None) -> Mix | None:
        """None for form 'none'."""
        return None if form == "none" else cls(form, ALPHAS[form] if alpha is None else alpha)

    def __call__(self, images: Tensor, labels: Tensor, seed: int, step: int, rank: int) -> tuple[Tensor, MixedLabels]:
        """images: uint8 (B, 3, S, S), of which new ones are made. A function of (seed, step, rank)."""
        draws = np.random.default_rng(seeding.key(seed, "mix", step, rank))
        share = draws.beta(self.alpha, self.alpha)
        share = max(share, 1 - share)  # the first image is the main one, whose label the metrics of training count
        order = torch.from_numpy(draws.permutation(len(images))).to(images.device)
        others = images[order]
        if self.form == "mixup":
            mixed = torch.lerp(images.float(), others.float(), 1 - share).round().to(images.dtype)
        else:
            height, width = images.shape[-2:]
            piece = int(height * (1 - share) ** 0.5), int(width * (1 - share) ** 0.5)
            top, left = draws.integers(height - piece[0] + 1), draws.integers(width - piece[1] + 1)
            place = ..., slice(top, top + piece[0]), slice(left, left + piece[1])
            mixed = images.clone()
            mixed[place] = others[place]
            share = 1 - piece[0] * piece[1] / (height * width)
        return mixed, MixedLabels(labels, labels[order], share)


@dataclass(frozen=True)
class MixedLabels:
    """The labels of a mixed batch, or of a part of it: both labels of every image. share: how much of it the first has."""

    first: Tensor
    second: Tensor
    share: float

    def __len__(self) -> int:
        return len(self.first)

    def split(self, sizes: Sequence[int]) -> list[MixedLabels]:
        pairs = zip(self.first.split(sizes), self.second.split(sizes), strict=True)
        return [MixedLabels(first, second, self.share) for first, second in pairs]

    def weight(self, weight: Callable[[Tensor], Any]) -> Any:
        """weight: the divisor of the mean loss over labels."""
        return self.share * weight(self.first) + (1 - self.share) * weight(self.second)

    def mean_loss(
        self, logits: Tensor, mean_loss: Callable[[Tensor, Tensor], Tensor], weight: Callable[[Tensor], Any]
    ) -> Tensor:
        """The weighted mean over both labels of every image: that of a batch follows from those of its parts."""
        first = self.share * weight(self.first) * mean_loss(logits, self.first)
        second = (1 - self.share) * weight(self.second) * mean_loss(logits, self.second)
        return (first + second) / self.weight(weight)
