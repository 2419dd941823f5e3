"""strategy.sync_batchnorm: layers that compute over all processes are the same layers, with all that is in them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from src.engine.processes.sync_batchnorm import SyncedBatchNorm
from src.engine.runs.errors import UserError
from src.models.backbones import build_backbone


class Loud(nn.BatchNorm2d):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(images)


def trained(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # for drop connect
    return network.train()(images)


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_efficientnet", "resnet18", "efficientnet_lite0"])
def test_the_network_that_is_trained_is_the_one_that_is_built_again(name):
    """timm's BatchNormAct2d has an activation in it, which torch's own conversion drops."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network, _ = build_backbone(name, keep_classifier=False, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        network.train()(images)  # statistics that are not those of a new network
        expected = network.eval()(images)
        kinds = [type(layer) for layer in network.modules()]
        before, plugin = copy.deepcopy(network), SyncedBatchNorm()
        synced = plugin.apply(network)
        assert any(isinstance(layer, nn.SyncBatchNorm) for layer in synced.modules())
        torch.testing.assert_close(synced(images), expected)
        torch.testing.assert_close(trained(synced, images), trained(before, images))
        state = {key: tensor.clone() for key, tensor in synced.eval().state_dict().items()}
        expected = synced(images)
        network = plugin.revert(synced)
        assert [type(layer) for layer in network.modules()] == kinds
        rebuilt, _ = build_backbone(name, keep_classifier=False, image_size=64)
        rebuilt.load_state_dict(state)
        for one in (network, rebuilt):
            torch.testing.assert_close(one.eval()(images), expected)


def test_what_stays_with_a_layer():
    layer = nn.BatchNorm2d(3, eps=0.01, momentum=0.3).eval()
    weight, plugin = layer.weight, SyncedBatchNorm()
    plugin.apply(layer)
    assert (type(layer), layer.eps, layer.momentum, layer.training) == (nn.SyncBatchNorm, 0.01, 0.3, False)
    plugin.revert(layer)
    assert type(layer) is nn.BatchNorm2d
    assert layer.weight is weight


def test_a_layer_that_does_more_is_refused_before_anything_changes():
    network = nn.Sequential(nn.BatchNorm2d(3), Loud(3))
    with pytest.raises(UserError, match="class Loud"):
        SyncedBatchNorm().apply(network)
    assert type(network[0]) is nn.BatchNorm2d
