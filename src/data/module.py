"""The DataModule: images to batches of bytes, in an order and with an augmentation that depend on nothing but numbers."""

from __future__ import annotations

import lightning as L
import torch

from src.config import Data
from src.data.transforms import train_transform
from src.engine.feature_bank.bank import FeatureBank
from src.engine.feature_bank.loader import BankedLoader, split_features, train_features
from src.engine.images.image_loader import ImageLoader, LoaderSettings
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.loading import eval_loader, loader_settings, train_loader
from src.engine.images.resizing import Transform, eval_transform
from src.engine.images.sampler import WHOLE, EpochSampler, Share, classes_to_balance, share_of
from src.engine.runs.epochs import batches_per_epoch
from src.engine.weights.preprocessing import Preprocessing


class ImageData(L.LightningDataModule):
    """Train and val loaders. Batches are (images uint8 (B, 3, S, S), labels int64 (B,) or float32 (B, names))."""

    def __init__(
        self,
        data: Data,
        images: LabelledImages,
        preprocessing: Preprocessing,
        seed: int,
        limit_batches: int | None = None,
        bank: FeatureBank | None = None,
    ) -> None:
        super().__init__()
        self.bank = bank
        self.config, self.images, self.preprocessing, self.seed = data, images, preprocessing, seed
        batches = batches_per_epoch(len(images.splits["train"]), data.batch_size)
        self.steps_per_epoch = min(batches, limit_batches or batches)

    def train_dataloader(self) -> ImageLoader | BankedLoader:
        """Called by Lightning after the loops were restored, so that the sampler can start where the run stopped."""
        done = self.trainer.global_step if self.trainer else 0
        # Not trainer.current_epoch: after a save at the end of an epoch it is still that epoch, and loader processes
        # fetch the first batches before Lightning calls set_epoch.
        start = divmod(done, self.steps_per_epoch)
        self._sampler = self._build_sampler(share_of(self.trainer), start)
        sampler, bank = self._sampler, self.bank
        loader = self._train_loader(train_transform(self.preprocessing, self.config.augment), sampler)
        if bank is None or self.config.mix != "none":  # features of mixed images are in no bank
            return loader
        return BankedLoader(loader, lambda: bank.covers(sampler.epoch), lambda: train_features(bank, sampler))

    def labels_of_batch(self, epoch: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The labels of this process's share of a training batch, which may be empty, and of the whole batch."""
        whole = self._sampler.whole_batch(epoch, batch)
        own = self._sampler.share.of(whole)
        return self.images.targets(own), self.images.targets(whole)

    def names_of_batch(self, epoch: int, batch: int) -> list[str]:
        """What the images of a training batch are called."""
        return [self.images.names[index] for index in self._sampler.whole_batch(epoch, batch)]

    def _train_loader(self, transform: Transform, sampler: EpochSampler) -> ImageLoader:
        return train_loader(self.images, transform, sampler, self._settings(), self.preprocessing.image_size)

    def statistics_loader(self) -> ImageLoader:
        """An epoch of training images, not augmented, for BatchNorm statistics."""
        return self._train_loader(eval_transform(self.preprocessing), self._build_sampler())

    def _build_sampler(self, share: Share = WHOLE, start: tuple[int, int] = (0, 0)) -> EpochSampler:
        labels = classes_to_balance(self.images) if self.config.sampler == "balanced" else None
        return EpochSampler(self.images.splits["train"], self.config.batch_size, self.seed, share, start, labels)

    def val_dataloader(self) -> ImageLoader | BankedLoader:
        share, trainer, bank = share_of(self.trainer), self.trainer, self.bank
        loader = eval_loader(self.images, "val", self.preprocessing, self._settings(), share)
        if bank is None or trainer is None:
            return loader
        return BankedLoader(
            loader, lambda: bank.covers(trainer.current_epoch), lambda: split_features(bank, "val", share)
        )

    def _settings(self) -> LoaderSettings:
        processes = share_of(self.trainer).world // self.trainer.num_nodes if self.trainer else 1
        return loader_settings(self.config, self.images, max(1, processes))
