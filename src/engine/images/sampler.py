"""Which images a batch holds: a function of (seed, epoch, batch), so that training can go on from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils.data import Sampler

from src.engine.commands.user_command import corrected
from src.engine.images.labelled_images import LabelledImages
from src.engine.runs import seeding
from src.engine.runs.epochs import batches_per_epoch
from src.engine.runs.errors import UserError

if TYPE_CHECKING:
    import lightning as L  # takes seconds; predict does without it

Item = TypeVar("Item")

REPETITION = 10**9  # an image that is drawn again in an epoch is augmented as in one that no run reaches


@dataclass(frozen=True)
class Share:
    """The part of every batch that one process works on: every world-th image, from its rank on."""

    rank: int = 0
    world: int = 1

    def of(self, batch: Sequence[Item]) -> list[Item]:
        return list(batch[self.rank :: self.world])


WHOLE = Share()


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys, on which the augmentation depends: the share of one process.

    The order of an epoch is cut into global batches of `batch_size`, so that one process and two see the same images. A
    last batch of one image joins the batch before it, since BatchNorm cannot normalise a single image.

    start: (epoch, batch) at which training goes on. labels: the classes of the images (N,), each of which is then drawn equally
    often.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        share: Share = WHOLE,
        start: tuple[int, int] = (0, 0),
        labels: torch.Tensor | None = None,
    ) -> None:
        self.indices, self.batch_size, self.seed, self.share = indices, batch_size, seed, share
        self.start, self.epoch = start, start[0]
        order = partial(_each_once, seed, len(indices)) if labels is None else partial(_balanced, seed, labels)
        self._order = lru_cache(maxsize=2)(order)  # of an epoch; each batch asks for it

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
            whole = self._keys(self.epoch, batch)
            # A rank without an image computes one that does not count, because the others wait for its gradients. A single
            # image is duplicated: BatchNorm needs two, and the mean is unchanged.
            members = self.share.of(whole) or whole[:1]
            if len(members) == 1 < self.share.world:
                members = 2 * members
            yield members

    def whole_batch(self, epoch: int, batch: int) -> list[int]:
        """The indices of the images that all processes train on in a step."""
        return [index for _, index in self._keys(epoch, batch)]

    def _keys(self, epoch: int, batch: int) -> list[tuple[int, int]]:
        order = self._order(epoch)
        end = (batch + 1) * self.batch_size if batch < len(self) - 1 else len(order)
        draws = order[batch * self.batch_size : end]
        return [(epoch + REPETITION * repetition, self.indices[place]) for repetition, place in draws]


def _each_once(seed: int, length: int, epoch: int) -> list[tuple[int, int]]:
    """(0, place) of every image, shuffled."""
    return [(0, place) for place in seeding.epoch_order(seed, epoch, length)]


def _balanced(seed: int, labels: torch.Tensor, epoch: int) -> list[tuple[int, int]]:
    """(how often it was drawn before, place) of as many images as there are, equally many of each class, to within one.

    A small class is gone through again and again, shuffled anew each time; of a large one another part is drawn per epoch.
    """
    generator = seeding.generator(seed, "balanced order", epoch)
    counts = labels.unique(return_counts=True)[1].tolist()
    classes = labels.argsort(stable=True).split(counts)
    each, more = divmod(len(labels), len(classes))
    draws: list[tuple[int, int]] = []
    for rank, number in enumerate(torch.randperm(len(classes), generator=generator).tolist()):
        members, wanted = classes[number], each + (rank < more)
        for repetition in range(-(-wanted // len(members))):
            shuffled = members[torch.randperm(len(members), generator=generator)]
            draws += [(repetition, place) for place in shuffled[: wanted - repetition * len(members)].tolist()]
    return [draws[place] for place in torch.randperm(len(draws), generator=generator).tolist()]


def classes_to_balance(images: LabelledImages) -> torch.Tensor:
    """The class of each training image. Raises UserError where images have none."""
    labels = images.targets(images.splits["train"])
    if labels.is_floating_point():
        raise UserError(
            "data.sampler=balanced draws each class equally often, and these images have no class",
            why="a label of your task is a list of values",
            fix=corrected(remove=["data.sampler"]),
        )
    return labels


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
