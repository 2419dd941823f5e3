"""timm's create_model, create_dataset, create_loader and create_optimizer_v2, as its train.py calls them."""

from __future__ import annotations

import torch
from job import BATCH, CLASSES, MEAN, SEED, STD, WEIGHT_DECAY, read_arguments
from timm import create_model
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, accuracy, freeze, random_seed
from torch import nn
from torch.utils.data import DataLoader


def evaluate(network: nn.Module, loader: DataLoader) -> float:
    network.eval()
    top1 = AverageMeter()
    with torch.inference_mode():
        for images, labels in loader:
            top1.update(accuracy(network(images), labels)[0].item(), len(labels))
    return top1.avg


def main() -> None:
    arguments = read_arguments()
    job = arguments.job
    random_seed(SEED)
    network = create_model("resnet18", num_classes=CLASSES, checkpoint_path=str(arguments.weights))
    if job.head_only:
        freeze(network, [name for name, _ in network.named_children() if name != "fc"])  # its BatchNorm too
    optimizer = create_optimizer_v2(network, opt="adamw", lr=job.lr, weight_decay=WEIGHT_DECAY)
    train, val = (
        create_loader(
            create_dataset("", root=arguments.data, split=split),
            input_size=(3, job.size, job.size),
            batch_size=BATCH,
            is_training=split == "train",  # then the last short batch is dropped
            no_aug=True,
            interpolation="bilinear",
            mean=MEAN,
            std=STD,
            crop_pct=1.0,
            num_workers=1,
            use_prefetcher=False,  # which needs a GPU
        )
        for split in ("train", "val")
    )
    criterion = nn.CrossEntropyLoss()
    for epoch in range(job.epochs):
        network.train()
        for images, labels in train:
            optimizer.zero_grad()
            criterion(network(images), labels).backward()
            optimizer.step()
        print(f"epoch {epoch} top1 {evaluate(network, val):.2f}", flush=True)
    torch.save(network.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
