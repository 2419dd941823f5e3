"""The DataModule: pictures to batches of bytes, in an order and with an augmentation that depend on nothing but numbers."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader

from src.config import Data
from src.data.loading import TrainDataset, eval_loader, leave_signals_to_the_trainer, num_workers
from src.data.pictures import Pictures
from src.data.sampler import EpochSampler, batches_per_epoch
from src.data.transforms import Transform, eval_transform, train_transform
from src.preprocessing import Preprocessing


class PictureData(L.LightningDataModule):
    """Train and val loaders. Batches are (images uint8 (B, 3, S, S), labels int64 (B,))."""

    def __init__(
        self, data: Data, pictures: Pictures, preprocessing: Preprocessing, seed: int, limit_batches: int | None = None
    ) -> None:
        super().__init__()
        self.config, self.pictures, self.preprocessing, self.seed = data, pictures, preprocessing, seed
        batches = batches_per_epoch(len(pictures.splits["train"]), data.batch_size)
        self.steps_per_epoch = min(batches, limit_batches or batches)

    def train_dataloader(self) -> DataLoader:
        """Called by Lightning after the loops were restored, so that the sampler can start where the run stopped."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0
        # Not trainer.current_epoch: after a save at the end of an epoch it is still that epoch, and loader processes
        # fetch the first batches before Lightning calls set_epoch.
        epoch, start = divmod(done, self.steps_per_epoch)
        sampler = EpochSampler(
            self.pictures.splits["train"],
            self.config.batch_size,
            self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.trainer.world_size if self.trainer else 1,
            start_epoch=epoch,
            start=start,
        )
        return self._train_loader(train_transform(self.preprocessing, self.config.augment), sampler)

    def _train_loader(self, transform: Transform, sampler: EpochSampler) -> DataLoader:
        return DataLoader(
            TrainDataset(self.pictures, transform, self.seed),
            batch_sampler=sampler,
            num_workers=self._workers(),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_the_trainer,
        )

    def statistics_loader(self) -> DataLoader:
        """The training pictures once, shuffled and not augmented, for BatchNorm statistics."""
        sampler = EpochSampler(self.pictures.splits["train"], self.config.batch_size, self.seed)
        return self._train_loader(eval_transform(self.preprocessing), sampler)

    def val_dataloader(self) -> DataLoader:
        return eval_loader(self.pictures, "val", self.preprocessing, self.config, self._workers())

    def _workers(self) -> int:
        return num_workers(self.config, self.pictures, self.trainer.world_size if self.trainer else 1)
