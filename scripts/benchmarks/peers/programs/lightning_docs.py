"""A LightningModule and a Trainer as in Lightning's documentation, the frozen backbone as on its page on transfer learning."""

from __future__ import annotations

import lightning as L
import torch
from job import BATCH, CLASSES, MEAN, SEED, STD, WEIGHT_DECAY, Arguments, Job, read_arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2


class Network(L.LightningModule):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.job: Job = arguments.job
        self.backbone = resnet18(num_classes=CLASSES)
        self.backbone.load_state_dict(torch.load(arguments.weights, weights_only=True))
        self.classifier, self.backbone.fc = self.backbone.fc, nn.Identity()
        if self.job.head_only:
            self.backbone.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.job.head_only:
            self.backbone.eval()
            with torch.no_grad():
                features = self.backbone(images)
        else:
            features = self.backbone(images)
        return self.classifier(features)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.job.lr, weight_decay=WEIGHT_DECAY)


def main() -> None:
    arguments = read_arguments()
    job = arguments.job
    L.seed_everything(SEED)
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose([v2.Resize(job.size), v2.CenterCrop(job.size), *to_float])
    train, val = (
        DataLoader(ImageFolder(arguments.data / split, transform), BATCH, shuffle=split == "train", num_workers=1)
        for split in ("train", "val")
    )
    network = Network(arguments)
    trainer = L.Trainer(max_epochs=job.epochs, accelerator="cpu", default_root_dir=arguments.out.parent)
    trainer.fit(network, train, val)
    network.backbone.fc = network.classifier
    torch.save(network.backbone.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
