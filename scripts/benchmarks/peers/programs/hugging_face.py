"""transformers' Trainer with its TrainingArguments, around torchvision's network."""

from __future__ import annotations

import numpy as np
import torch
from job import BATCH, CLASSES, MEAN, SEED, STD, WEIGHT_DECAY, Arguments, read_arguments
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed


class ImageClassifier(nn.Module):
    """What a Trainer calls: a loss where there are labels, and logits."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.network = resnet18(num_classes=CLASSES)
        self.network.load_state_dict(torch.load(arguments.weights, weights_only=True))
        self.head_only = arguments.job.head_only
        if self.head_only:
            self.network.requires_grad_(False)
            self.network.fc.requires_grad_(True)

    def train(self, mode: bool = True) -> ImageClassifier:
        """The Trainer calls it before every step; a frozen backbone keeps BatchNorm's statistics."""
        super().train(mode)
        if self.head_only:
            self.network.eval()
        return self

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(examples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def measure(prediction: EvalPrediction) -> dict[str, float]:
    return {"acc": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def main() -> None:
    arguments = read_arguments()
    job = arguments.job
    set_seed(SEED)
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose([v2.Resize(job.size), v2.CenterCrop(job.size), *to_float])
    train, val = (ImageFolder(arguments.data / split, transform) for split in ("train", "val"))
    model = ImageClassifier(arguments)
    settings = TrainingArguments(
        output_dir=str(arguments.out.parent),
        num_train_epochs=job.epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=0.0,  # as the other peers; the default clips at 1
        dataloader_num_workers=1,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
        use_cpu=True,
        seed=SEED,
    )
    Trainer(model, settings, collate, train, val, compute_metrics=measure).train()
    torch.save(model.network.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
