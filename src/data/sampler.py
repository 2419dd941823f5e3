"""Which images a batch holds: a function of (seed, epoch, batch), so that training can go on from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from src import seeding


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for one process out of `world`.

    The order of an epoch is cut into global batches of `batch_size`, and each process takes every world-th image of
    a batch: one process and two see the same images. A last batch of one image joins the batch before it, since
    BatchNorm cannot normalise a single one.

    start: batches of `start_epoch` that were trained before the run was interrupted and are passed over.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        start_epoch: int = 0,
        start: int = 0,
    ) -> None:
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch, self.start_epoch, self.start = start_epoch, start_epoch, start
        self._ordered: tuple[int, list[int]] | None = None  # the order of the epoch that was asked for last

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
        first = self.start if self.epoch == self.start_epoch else 0
        for batch in range(first, len(self)):
            whole = self.whole_batch(self.epoch, batch)
            # A process for which none is left computes one that does not count: the others wait for its gradients. A single
            # one is there twice, since BatchNorm cannot normalise it; the mean over both is the same.
            members = self.own_part(whole) or whole[:1]
            if len(members) == 1 < self.world:
                members = 2 * members
            yield [(self.epoch, index) for index in members]

    def whole_batch(self, epoch: int, batch: int) -> list[int]:
        """The indices of the images that all processes train on in a step."""
        order = self._order(epoch)
        end = (batch + 1) * self.batch_size if batch < len(self) - 1 else len(order)
        return [self.indices[member] for member in order[batch * self.batch_size : end]]

    def own_part(self, whole: list[int]) -> list[int]:
        """Those of them that this process trains on; none, where there are fewer than processes."""
        return whole[self.rank :: self.world]

    def _order(self, epoch: int) -> list[int]:
        if self._ordered is None or self._ordered[0] != epoch:
            self._ordered = epoch, seeding.epoch_order(self.seed, epoch, len(self.indices))
        return self._ordered[1]


NOBODYS = -1  # the place of an image that does not count: the split's last one, with NOBODYS as its label


class PartSampler(Sampler[list[int]]):
    """Batches of places in a split, in its order: of each batch the part of one process out of `world`.

    Nothing is added where a batch does not divide, so that no image counts twice in a metric. A process that would have
    none at all gets NOBODYS: without a batch Lightning skips the validation, in which the others wait for it.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        parts = [range(start, min(start + batch_size, length))[rank::world] for start in range(0, length, batch_size)]
        self.parts = [list(part) for part in parts if part]
        if length and not self.parts:
            self.parts = [[NOBODYS]]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.parts)


def batches_per_epoch(images: int, batch_size: int) -> int:
    """How many global batches an epoch has."""
    full, rest = divmod(images, batch_size)
    return full + (1 if rest > 1 or full == 0 else 0)
