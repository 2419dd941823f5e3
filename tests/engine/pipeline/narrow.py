"""A small split network for the tests of strategy=model_parallel, and what they look at."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from src.models.model_parallel_resnet50 import ModelParallelResNet50

TWO, THREE = ["layer2"], ["layer1", "layer3"]
WIDTHS = {"layers": [3, 4, 6, 3], "width_per_group": 4}


class Narrow(ModelParallelResNet50):
    """Thin inside of its blocks, which makes it ten times quicker. With statistics that are not those of the images a
    block's output would grow, and grow again in the next."""

    def __init__(self, split_at: list[str]) -> None:
        ResNet.__init__(self, Bottleneck, **WIDTHS)
        self.fc = nn.Identity()
        for block in self.modules():
            if isinstance(block, Bottleneck):
                nn.init.constant_(block.bn3.weight, 0.2)
        self.split(split_at)


def unsplit() -> ResNet:
    """torchvision's own network of these widths."""
    return ResNet(Bottleneck, **WIDTHS)


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = found[name] is None if value is None else torch.equal(found[name], value)
        assert same, name


def stage_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stage")]
