"""The ResNet50 in stages: torchvision's network and keys, whatever the cut; on several GPUs, which fake tensors stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torchvision.models import resnet50

from src.engine.runs.errors import UserError
from src.models.model_parallel_resnet50 import BLOCKS, ModelParallelResNet50
from tests.conftest import parses


def test_weights_of_torchvision_go_in_and_come_out():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs, ours, back = resnet50(num_classes=5), ModelParallelResNet50(num_classes=5), resnet50(num_classes=5)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(4, 3, 32, 32)
    expected = theirs(images)  # in training mode: BatchNorm's statistics move
    for split_at in ([], ["layer2"], ["layer1", "layer3.2"], BLOCKS):
        ours.load_state_dict(back.state_dict() | theirs.state_dict())
        ours.split(split_at)
        assert len(ours.stages()) == len(split_at) + 1
        assert torch.equal(ours(images), expected)
    moved = ours.state_dict()
    back.load_state_dict(moved)
    assert all(torch.equal(value, moved[name]) for name, value in back.state_dict().items())
    assert moved["bn1.num_batches_tracked"] == 2


def test_stages_share_the_layers_of_the_network():
    ours = ModelParallelResNet50(num_classes=5, split_at=["layer1", "layer3.2"])
    stages = [list(stage.parameters()) for stage in ours.stages()]
    assert [id(weight) for stage in stages for weight in stage] == [id(weight) for weight in ours.parameters()]
    firsts = [ours.conv1.weight, ours.layer2[0].conv1.weight, ours.layer3[3].conv1.weight]
    assert [stage[0] is first for stage, first in zip(stages, firsts, strict=True)] == [True] * 3


def test_stages_lie_on_their_devices_and_images_follow():
    with FakeTensorMode():
        ours = ModelParallelResNet50(5, devices=["cuda:0", "cuda:1", "cuda:2"], split_at=["layer1", "layer3"])
        state = ours.state_dict()
        output = ours(torch.randn(2, 3, 32, 32))
    for name, device in {"conv1": 0, "layer1": 0, "layer2": 1, "layer3": 1, "layer4": 2, "fc": 2}.items():
        inside = {tensor.device for key, tensor in state.items() if key.startswith(name + ".")}
        assert inside == {torch.device("cuda", device)}, name
    assert (output.device, output.shape) == (torch.device("cuda:2"), (2, 5))


def test_a_missing_transfer_does_not_go_unnoticed():
    with FakeTensorMode():
        first, second = ModelParallelResNet50(5, devices=["cuda:0", "cuda:1"]).stages()
        x = first(torch.randn(2, 3, 32, 32, device="cuda:0"))
        with pytest.raises(RuntimeError, match=r"same device|two different devices"):
            second(x)


def test_what_is_frozen_stays_frozen_on_another_device():
    ours = ModelParallelResNet50(5)
    ours.layer1.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in ours.named_parameters()}
    ours.place(["cpu", "meta"])
    assert {name: weight.requires_grad for name, weight in ours.named_parameters()} == before
    assert all(isinstance(weight, nn.Parameter) and weight.is_leaf for weight in ours.parameters())
    assert ours.fc.weight.device.type == ours.layer4[0].bn1.running_mean.device.type == "meta"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "model=model_parallel_resnet50 strategy=pipeline trainer.devices=3 model.split_at=[layer1,layer3]"
    monkeypatch.setenv("TRAIN_COMMAND", f"python -m src.train {words}")


@pytest.mark.parametrize(
    ("split_at", "culprit"),
    [
        (["layer5"], "layer5"),
        (["layer4"], "layer4"),  # nothing with weights would be left
        (["conv1"], "conv1"),
        (["layer3", "layer1"], "layer3,layer1"),
        (["layer2", "layer2.3"], "layer2,layer2.3"),
    ],
)
def test_a_cut_that_cannot_be(typed, split_at, culprit):
    with pytest.raises(UserError) as caught:
        ModelParallelResNet50(split_at=split_at)
    check_answer(caught.value, culprit)


@pytest.mark.parametrize("devices", [["cpu"], ["cpu"] * 4])
def test_another_number_of_devices_than_stages(typed, devices):
    with pytest.raises(UserError) as caught:
        ModelParallelResNet50(split_at=["layer1", "layer3"], devices=devices)
    check_answer(caught.value, "3 stages", f"{len(devices)} device", "trainer.devices=3", "[layer1,layer3]")


def check_answer(error: UserError, *culprits: str) -> None:
    """It names the culprits, and what it suggests is a command."""
    text = error.render()
    assert all(culprit in text for culprit in culprits), text
    for fix in error.fix:
        assert "strategy=pipeline" in fix
        assert parses(fix.removeprefix("python -m src.train ").replace("'", "").split()), fix
