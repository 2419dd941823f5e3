"""fastai's DataLoaders and Learner, with torchvision's network and torch's AdamW."""

from __future__ import annotations

from functools import partial

import torch
from fastai.callback.training import BnFreeze
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params, set_seed
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from job import BATCH, CLASSES, MEAN, SEED, STD, WEIGHT_DECAY, read_arguments
from torch import nn
from torchvision.models import ResNet, resnet18


def head_apart(network: ResNet) -> list[list[nn.Parameter]]:
    head = params(network.fc)
    backbone = [parameter for name, parameter in network.named_parameters() if not name.startswith("fc.")]
    return [backbone, head]


def main() -> None:
    arguments = read_arguments()
    job = arguments.job
    set_seed(SEED)
    loaders = ImageDataLoaders.from_folder(
        arguments.data,
        valid="val",
        item_tfms=Resize(job.size),  # which cuts training images at a random place
        batch_tfms=Normalize.from_stats(MEAN, STD, cuda=False),
        bs=BATCH,
        drop_last=False,
        num_workers=1,
        device=torch.device("cpu"),
    )
    network = resnet18(num_classes=CLASSES)
    network.load_state_dict(torch.load(arguments.weights, weights_only=True))
    learner = Learner(
        loaders,
        network,
        CrossEntropyLossFlat(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        splitter=head_apart,
        metrics=accuracy,
        path=arguments.out.parent,
        wd=WEIGHT_DECAY,
        train_bn=not job.head_only,
        cbs=[BnFreeze] if job.head_only else None,
    )
    if job.head_only:
        learner.freeze()
    learner.fit(job.epochs, job.lr)
    torch.save(network.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
