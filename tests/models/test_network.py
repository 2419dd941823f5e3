from __future__ import annotations

import json

import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional

from src.engine.runs.errors import UserError
from src.engine.weights.backbone_names import pretrained_preprocessing
from src.engine.weights.preprocessing import Preprocessing
from src.models.network import Architecture, TransferNetwork, build_network
from tests.tolerance import DOUBLE

torch.set_num_threads(1)

IMAGENET = Preprocessing(64, 0.875, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def make_images(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def as_torchvision_does(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    images = functional.to_dtype(images, torch.get_default_dtype(), scale=True)
    return functional.normalize(images, preprocessing.mean, preprocessing.std)


@pytest.mark.numbers
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_network_is_torchvisions_with_its_last_layer_replaced(float64, channels_last):
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(weights=None)
    reference.fc = nn.Linear(512, 5)
    reference.eval()
    network = build_network(Architecture("resnet18", "linear", 5), IMAGENET, channels_last=channels_last).eval()
    own = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    network.backbone.load_state_dict(own)
    network.head.load_state_dict(reference.fc.state_dict())
    with torch.no_grad():
        expected = reference(as_torchvision_does(make_images(), IMAGENET))
        torch.testing.assert_close(network(make_images()), expected, rtol=DOUBLE, atol=DOUBLE)
    assert expected.std() > 0.01  # logits that are all alike would be equal to anything


def test_channels_last_reaches_the_weights_and_the_images():
    network = build_network(Architecture("resnet18", "linear", 5), IMAGENET)
    assert network.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert network.normalise(make_images()).is_contiguous(memory_format=torch.channels_last)
    plain = build_network(Architecture("resnet18", "linear", 5), IMAGENET, channels_last=False)
    assert plain.backbone.layer1[0].conv1.weight.is_contiguous()
    assert plain.normalise(make_images()).is_contiguous()


def test_vgg19_append_keeps_the_classifier_and_adds_a_layer():
    with torch.device("meta"):
        network = build_network(Architecture("vgg19", "append", 7), pretrained_preprocessing("vgg19"))
        reference = torchvision.models.vgg19().state_dict()
    assert isinstance(network.head, nn.Linear)
    assert (network.head.in_features, network.head.out_features) == (1000, 7)
    own = {k: v.shape for k, v in network.backbone.state_dict().items()}
    assert own == {k: v.shape for k, v in reference.items()}
    assert own["classifier.6.weight"] == (1000, 4096)


@pytest.mark.parametrize("head", ["linear", "mlp", "append"])
def test_the_state_dict_is_the_backbones_and_the_heads(head):
    architecture = Architecture("squeezenet1_1", head, 4, hidden=16, dropout=0.3)
    network = build_network(architecture, IMAGENET)
    assert {key.split(".")[0] for key in network.state_dict()} == {"backbone", "head"}
    again = build_network(Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))), IMAGENET).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        logits = network.eval()(make_images())
        assert logits.shape == (2, 4)
        assert torch.equal(logits, again(make_images()))


@pytest.mark.parametrize(
    ("backbone", "features"), [("efficientnet_lite0", 1280), ("googlenet", 1024), ("squeezenet1_1", 512)]
)
def test_features_are_flat_and_logits_plain_also_in_training(backbone, features):
    network = build_network(Architecture(backbone, "linear", 3), IMAGENET)
    assert network.training
    assert network.features(make_images()).shape == (2, features)
    logits = network(make_images())
    assert type(logits) is torch.Tensor
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_mean_over_the_places_of_a_map_is_what_the_head_gets():
    network = TransferNetwork(nn.Conv2d(3, 4, 32, 32), nn.Linear(4, 3), IMAGENET)
    images = make_images()
    map_of_features = network.backbone(network.normalise(images))
    assert map_of_features.shape == (2, 4, 2, 2)
    torch.testing.assert_close(network.features(images), map_of_features.flatten(2).mean(2))
    assert network(images).shape == (2, 3)


def test_the_head_gets_the_features():
    network = build_network(Architecture("squeezenet1_1", "linear", 3), IMAGENET).eval()
    with torch.no_grad():
        assert torch.equal(network(make_images()), network.head(network.features(make_images())))


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalising_leaves_the_images_alone_and_follows_the_networks_type(channels_last):
    architecture = Architecture("squeezenet1_1", "linear", 3)
    network = build_network(architecture, IMAGENET, channels_last=channels_last).eval()
    images = make_images().float()
    before = images.clone()
    torch.testing.assert_close(network.normalise(images), as_torchvision_does(make_images(), IMAGENET))
    assert torch.equal(images, before)
    assert network.bfloat16()(make_images()).dtype == torch.bfloat16


def test_a_size_the_backbone_does_not_take_is_refused_before_anything_is_trained():
    small = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"), pytest.raises(UserError, match="vgg11 cannot take images of 16 x 16"):
        build_network(Architecture("vgg11", "linear", 3), small)
