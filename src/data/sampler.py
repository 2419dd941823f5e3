"""Which pictures a batch holds: a function of (seed, epoch, batch), so that training can go on from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from src import seeding


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for one process out of `world`.

    The order of an epoch is cut into global batches of `batch_size`, and each process takes every world-th picture of
    a batch: one process and two see the same pictures. A last batch of one picture joins the batch before it, since
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
        order = seeding.epoch_order(self.seed, self.epoch, len(self.indices))
        first = self.start if self.epoch == self.start_epoch else 0
        for batch in range(first, len(self)):
            end = (batch + 1) * self.batch_size if batch < len(self) - 1 else len(order)
            members = order[batch * self.batch_size : end][self.rank :: self.world]
            yield [(self.epoch, self.indices[member]) for member in members]


def batches_per_epoch(pictures: int, batch_size: int) -> int:
    """How many global batches an epoch has."""
    full, rest = divmod(pictures, batch_size)
    return full + (1 if rest > 1 or full == 0 else 0)
