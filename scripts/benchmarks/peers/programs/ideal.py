"""Nothing twice: features (head only) or decoded images (everything) once, and then a loop over tensors."""

from __future__ import annotations

import torch
from job import BATCH, CLASSES, MEAN, SEED, STD, WEIGHT_DECAY, read_arguments
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2


def normalised(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def train(module: nn.Module, inputs: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    """inputs: features (N, F), or uint8 images (N, 3, H, W)."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(BATCH):
            batch = inputs[chosen] if inputs.ndim == 2 else normalised(inputs[chosen])
            loss = F.cross_entropy(module(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    arguments = read_arguments()
    job = arguments.job
    torch.manual_seed(SEED)
    network = resnet18(num_classes=CLASSES)
    network.load_state_dict(torch.load(arguments.weights, weights_only=True))
    network.to(memory_format=torch.channels_last)
    transform = v2.Compose([v2.Resize(job.size), v2.CenterCrop(job.size), v2.PILToTensor()])
    loader = DataLoader(ImageFolder(arguments.data / "train", transform), BATCH, num_workers=1)
    if job.head_only:
        head, network.fc = network.fc, nn.Identity()
        network.eval()
        with torch.inference_mode():
            parts = [(network(normalised(images)), labels) for images, labels in loader]
    else:
        parts = list(loader)
    inputs, labels = (torch.cat(part).clone() for part in zip(*parts, strict=True))
    if job.head_only:
        train(head, inputs, labels, job.epochs, job.lr)
        network.fc = head
    else:
        train(network.train(), inputs, labels, job.epochs, job.lr)
    torch.save(network.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
