"""A loop as in PyTorch's tutorials: ImageFolder, DataLoader, an evaluation after every epoch."""

from __future__ import annotations

import torch
from job import BATCH, CLASSES, MEAN, SEED, STD, WEIGHT_DECAY, read_arguments
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2


def evaluate(network: nn.Module, loader: DataLoader) -> float:
    network.eval()
    with torch.inference_mode():
        hits = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in loader)
    return hits / len(loader.dataset)


def main() -> None:
    arguments = read_arguments()
    job = arguments.job
    torch.manual_seed(SEED)
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose([v2.Resize(job.size), v2.CenterCrop(job.size), *to_float])
    train, val = (
        DataLoader(ImageFolder(arguments.data / split, transform), BATCH, shuffle=split == "train", num_workers=1)
        for split in ("train", "val")
    )
    network = resnet18(num_classes=CLASSES)
    network.load_state_dict(torch.load(arguments.weights, weights_only=True))
    if job.head_only:
        network.requires_grad_(False)
        network.fc.requires_grad_(True)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=WEIGHT_DECAY)
    for epoch in range(job.epochs):
        network.train(not job.head_only)  # else BatchNorm's statistics would change under the frozen backbone
        for images, labels in train:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch} val/acc {evaluate(network, val):.4f}", flush=True)
    torch.save(network.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
