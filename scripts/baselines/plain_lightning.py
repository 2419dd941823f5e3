"""An ordinary Lightning script, as a competent user writes it in an afternoon: the comparison of docs/reliability.md.

    python scripts/baselines/plain_lightning.py --root photos --out plain

Images in photos/train/CLASS/ and photos/val/CLASS/, a small residual network, Adam, checkpoints of the best and of the last
epoch. The repeated command continues from the last.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder


class Block(nn.Module):
    """A residual block that halves the resolution."""

    def __init__(self, channels: int, wider: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(),
            nn.Conv2d(wider, wider, 3, padding=1, bias=False),
            nn.BatchNorm2d(wider),
        )
        self.shortcut = nn.Conv2d(channels, wider, 1, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.body(features) + self.shortcut(features))


class Model(L.LightningModule):
    def __init__(self, classes: list[str], lr: float, dropout: float = 0.1, frozen_batchnorm: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            Block(3, 16),
            Block(16, 32),
            Block(32, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64, len(classes)),
        )

    def on_train_epoch_start(self) -> None:
        for layer in self.modules():
            if self.hparams.frozen_batchnorm and isinstance(layer, nn.BatchNorm2d):
                layer.eval()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.network(images)
        self.log("val_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def loaders(root: Path, size: int, batch_size: int, workers: int) -> tuple[DataLoader, DataLoader]:
    augmented = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    plain = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])
    train, val = ImageFolder(str(root / "train"), augmented), ImageFolder(str(root / "val"), plain)
    options = {"batch_size": batch_size, "num_workers": workers}
    return DataLoader(train, shuffle=True, **options), DataLoader(val, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that processes wait for each other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=None, help="also save every so many steps")
    parser.add_argument("--frozen-batchnorm", action="store_true")
    parser.add_argument("--resume", default="last", help="a checkpoint to go on from")
    options = parser.parse_args()

    L.seed_everything(options.seed, workers=True)
    torch.set_num_threads(1)
    train, val = loaders(options.root, options.image_size, options.batch_size, options.workers)
    model = Model(train.dataset.classes, options.lr, options.dropout, options.frozen_batchnorm)
    callbacks = [
        ModelCheckpoint(options.out, filename="best", monitor="val_acc", mode="max", save_last=True, save_top_k=1)
    ]
    if options.save_every:
        callbacks.append(
            ModelCheckpoint(options.out, filename="step", save_last=True, every_n_train_steps=options.save_every)
        )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=options.devices,
        strategy=DDPStrategy(timeout=timedelta(seconds=options.timeout)) if options.devices > 1 else "auto",
        max_epochs=options.epochs,
        deterministic=True,
        default_root_dir=options.out,
        callbacks=callbacks,
        logger=CSVLogger(options.out, name="logs"),
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    trainer.fit(model, train, val, ckpt_path=options.resume)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
