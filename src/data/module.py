"""The DataModule: images to batches of bytes, in an order and with an augmentation that depend on nothing but numbers."""

from __future__ import annotations

import lightning as L
import torch

from src.config import Data
from src.data.image_loader import ImageLoader
from src.data.labelled_images import LabelledImages
from src.data.loading import eval_loader, num_workers, train_loader
from src.data.sampler import EpochSampler, batches_per_epoch
from src.data.transforms import Transform, eval_transform, train_transform
from src.preprocessing import Preprocessing


class ImageData(L.LightningDataModule):
    """Train and val loaders. Batches are (images uint8 (B, 3, S, S), labels int64 (B,))."""

    def __init__(
        self,
        data: Data,
        images: LabelledImages,
        preprocessing: Preprocessing,
        seed: int,
        limit_batches: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.images, self.preprocessing, self.seed = data, images, preprocessing, seed
        batches = batches_per_epoch(len(images.splits["train"]), data.batch_size)
        self.steps_per_epoch = min(batches, limit_batches or batches)

    def train_dataloader(self) -> ImageLoader:
        """Called by Lightning after the loops were restored, so that the sampler can start where the run stopped."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0
        # Not trainer.current_epoch: after a save at the end of an epoch it is still that epoch, and loader processes
        # fetch the first batches before Lightning calls set_epoch.
        epoch, start = divmod(done, self.steps_per_epoch)
        rank, world = shared_out(self.trainer)
        sampler = EpochSampler(
            self.images.splits["train"],
            self.config.batch_size,
            self.seed,
            rank=rank,
            world=world,
            start_epoch=epoch,
            start=start,
        )
        self._sampler = sampler
        return self._train_loader(train_transform(self.preprocessing, self.config.augment), sampler)

    def labels_of_batch(self, epoch: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The labels of a training batch: those of this process's part, which may be none, and those of the whole."""
        whole = self._sampler.whole_batch(epoch, batch)
        own = self._sampler.own_part(whole)
        of_own, of_whole = ([self.images.labels[index] for index in part] for part in (own, whole))
        return torch.tensor(of_own, dtype=torch.int64), torch.tensor(of_whole)

    def names_of_batch(self, epoch: int, batch: int) -> list[str]:
        """What the images of a training batch are called."""
        return [self.images.names[index] for index in self._sampler.whole_batch(epoch, batch)]

    def _train_loader(self, transform: Transform, sampler: EpochSampler) -> ImageLoader:
        size = self.preprocessing.image_size
        return train_loader(self.images, transform, sampler, self.config, self._workers(), size)

    def statistics_loader(self) -> ImageLoader:
        """The training images once, shuffled and not augmented, for BatchNorm statistics."""
        sampler = EpochSampler(self.images.splits["train"], self.config.batch_size, self.seed)
        return self._train_loader(eval_transform(self.preprocessing), sampler)

    def val_dataloader(self) -> ImageLoader:
        rank, world = shared_out(self.trainer)
        return eval_loader(self.images, "val", self.preprocessing, self.config, self._workers(), rank=rank, world=world)

    def _workers(self) -> int:
        processes = shared_out(self.trainer)[1] // self.trainer.num_nodes if self.trainer else 1
        return num_workers(self.config, self.images, max(1, processes))


def shared_out(trainer: L.Trainer | None) -> tuple[int, int]:
    """(rank, world): which part of every batch this process trains on, and in how many parts batches are shared out.

    (0, 1) where there is one process, and where several work on the same batch, as in strategy=pipeline.
    """
    share = trainer.distributed_sampler_kwargs if trainer else None
    return (share["rank"], share["num_replicas"]) if share else (0, 1)
