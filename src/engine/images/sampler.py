"""Which images a batch holds: a function of (seed, epoch, batch), so that training can go on from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler

from src.engine.runs import seeding
from src.engine.runs.epochs import batches_per_epoch

if TYPE_CHECKING:
    import lightning as L  # takes seconds; predict does without it


@dataclass(frozen=True)
class Share:
    """The part of every batch that one process works on: every world-th image, from its rank on."""

    rank: int = 0
    world: int = 1

    def of(self, batch: Sequence[int]) -> list[int]:
        return list(batch[self.rank :: self.world])


WHOLE = Share()


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys: the share of one process.

    The order of an epoch is cut into global batches of `batch_size`, so that one process and two see the same images. A
    last batch of one image joins the batch before it, since BatchNorm cannot normalise a single image.

    start: (epoch, batch) at which training goes on.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        share: Share = WHOLE,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.indices, self.batch_size, self.seed, self.share = indices, batch_size, seed, share
        self.start, self.epoch = start, start[0]

    @property
    def sampler(self) -> EpochSampler:
        """Where Lightning looks for set_epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch, also in the epoch that is continued: Lightning counts the skipped ones itself."""
        return batches_per_epoch(len(self.indices), self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start_epoch, start_batch = self.start
        for batch in range(start_batch if self.epoch == start_epoch else 0, len(self)):
            whole = self.whole_batch(self.epoch, batch)
            # A rank without an image computes one that does not count, because the others wait for its gradients. A single
            # image is duplicated: BatchNorm needs two, and the mean is unchanged.
            members = self.share.of(whole) or whole[:1]
            if len(members) == 1 < self.share.world:
                members = 2 * members
            yield [(self.epoch, index) for index in members]

    def whole_batch(self, epoch: int, batch: int) -> list[int]:
        """The indices of the images that all processes train on in a step."""
        order = _epoch_order(self.seed, epoch, len(self.indices))
        end = (batch + 1) * self.batch_size if batch < len(self) - 1 else len(order)
        return [self.indices[member] for member in order[batch * self.batch_size : end]]


_epoch_order = lru_cache(maxsize=2)(seeding.epoch_order)  # each batch asks for it

PADDING = -1  # the place of an image that does not count: the split's last one, with a label that no image has


def padding_label(label: torch.Tensor) -> torch.Tensor:
    """Like the label: PADDING for a class, nan for values."""
    return torch.full_like(label, float("nan") if label.is_floating_point() else PADDING)


def is_padding(labels: torch.Tensor) -> bool:
    """Of a batch."""
    return len(labels) == 1 and bool(labels.isnan().all() if labels.is_floating_point() else labels[0] == PADDING)


class PartSampler(Sampler[list[int]]):
    """Batches of places in a split, in its order: the share of one process.

    Nothing is added where a batch does not divide, so that no image counts twice in a metric. A process without any image
    gets PADDING: without a batch Lightning skips the validation, in which the others wait for it.
    """

    def __init__(self, length: int, batch_size: int, share: Share = WHOLE) -> None:
        batches = (range(start, min(start + batch_size, length)) for start in range(0, length, batch_size))
        self.parts = [part for batch in batches if (part := share.of(batch))]
        if length and not self.parts:
            self.parts = [[PADDING]]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.parts)


def share_of(trainer: L.Trainer | None) -> Share:
    """The part of every batch that this process trains on: all of it where several work on the same batch (pipeline)."""
    if trainer is None or not getattr(trainer.strategy, "shares_batches", True):
        return WHOLE
    return Share(trainer.global_rank, trainer.world_size)
