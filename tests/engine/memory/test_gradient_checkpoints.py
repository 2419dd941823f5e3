"""memory.checkpoint_gradients: less is kept for the backward pass, and everything else is the same to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from src.engine.memory.gradient_checkpoints import checkpoint_gradients
from src.models.backbones import blocks, build_backbone
from tests.engine.runs.small_training import classifier, fit, freezing


def step(backbone: nn.Module, size: int) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients and buffers after a forward and a backward pass in train mode, and the bytes kept between the two."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = backbone(torch.randn(4, 3, size, size)).square().mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    own = sum(number for place, number in kept.items() if place not in weights)
    return found | {name: buffer.clone() for name, buffer in backbone.named_buffers()}, own


@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite0", 64), ("resnet18", 64), ("vit", 32)])
def test_gradients_and_statistics_are_the_same_to_the_bit_and_less_is_kept(name, size):
    """With dropout (of drop_connect in EfficientNet, of its own in the transformer) and BatchNorm; a frozen part, too."""
    torch.manual_seed(0)
    if name == "vit":
        plain = torchvision.models.VisionTransformer(size, 8, 3, 2, 32, 64, dropout=0.2)
    else:
        plain, _ = build_backbone(name, keep_classifier=False, image_size=size)
    plain.train()
    next(plain.children()).requires_grad_(False)
    saving = copy.deepcopy(plain)
    names = list(saving.state_dict())
    checkpoint_gradients(saving, blocks(saving))
    saving = copy.deepcopy(saving)  # as the moving average and data.batch_size=auto copy it
    (expected, before), (found, after) = step(plain, size), step(saving, size)
    assert found.keys() == expected.keys()
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())
    assert after < 0.6 * before
    assert list(saving.state_dict()) == names
    assert repr(saving) == repr(plain)


def test_single_layers_are_not_computed_twice(caplog):
    backbone = torchvision.models.alexnet()
    checkpoint_gradients(backbone, blocks(backbone))
    assert "no effect" in caplog.text


def test_a_training_is_the_same_to_the_bit():
    weights = []
    for checkpoints in (False, True):
        model = classifier(2)
        if checkpoints:
            model.network.backbone.layer1 = nn.Sequential(model.network.backbone.layer1)
            checkpoint_gradients(model.network.backbone, [])
            for layer in (model.network.backbone.stem, model.network.backbone.layer2):
                nested = nn.ModuleDict({"inner": layer})
                checkpoint_gradients(nested, ["inner"])
        fit(model, 2, freezing(2, preset="full"))
        weights.append(torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()]))
    assert weights[0].equal(weights[1])
