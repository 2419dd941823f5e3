"""What is frozen stays as it was, to the bit; what is trained when follows from the epoch alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src.callbacks.freezing import apply, schedule, trainable
from src.config import Freeze
from src.errors import UserError
from src.models.backbones import blocks
from src.models.network import Architecture, build_network
from src.preprocessing import Preprocessing

SMALL = Preprocessing(32, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RESNET_BLOCKS = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]


@pytest.fixture
def network():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build_network(Architecture("resnet18", "linear", 3), SMALL)


def phases(max_epochs=100, names=RESNET_BLOCKS, **settings):
    return schedule(Freeze(**settings), names, max_epochs, ["layer4.0.conv1.weight", "layer4.1.conv1.weight"])


def test_presets():
    everything = ["head", *(f"backbone.{name}" for name in RESNET_BLOCKS)]
    assert phases(preset="head_only") == {0: ["head"]}
    assert phases(preset="full") == {0: everything}
    assert phases(preset="last_n", last_n=2, unfreeze_epoch=2) == {
        0: ["head"],
        2: ["backbone.layer3", "backbone.layer4"],
    }
    assert phases(preset="last_n", last_n=99, unfreeze_epoch=0) == {0: everything}
    assert phases(preset="gradual", last_n=2, unfreeze_epoch=3) == {
        0: ["head"],
        3: ["backbone.layer4"],
        4: ["backbone.layer3"],
    }
    assert phases(preset="gradual", last_n=1, unfreeze_epoch=0) == {0: ["head", "backbone.layer4"]}


def test_phases_name_blocks_parts_and_patterns():
    given = {4: ["all"], 0: ["head"], 1: ["layer4.1"], 2: ["layer[34]"], 3: ["last_3"]}
    assert list(phases(phases=given)) == [0, 1, 2, 3, 4]
    assert phases(phases=given)[1] == ["backbone.layer4.1"]
    assert phases(phases=given)[2] == ["backbone.layer3", "backbone.layer4"]
    assert phases(phases=given)[3] == ["backbone.layer2", "backbone.layer3", "backbone.layer4"]
    with pytest.raises(UserError) as error:
        phases(phases={0: ["head"], 1: ["layer5"]})
    assert "conv1, bn1, layer1" in error.value.render()
    with pytest.raises(UserError, match=r"layer4\.7"):  # a part that is not there would train nothing
        phases(phases={0: ["head"], 1: ["layer4.7"]})


def test_the_trainable_set_is_a_function_of_the_epoch(network):
    plan = phases(preset="gradual", last_n=2, unfreeze_epoch=1)
    for epoch in (0, 3, 1, 2, 0):  # in any order: a resumed run jumps
        apply(network, plan, epoch, "update")
        names = tuple(trainable(plan, epoch))
        for name, parameter in network.named_parameters():
            assert parameter.requires_grad == name.startswith(tuple(f"{own}." for own in names)), (epoch, name)


def step(network, optimizer):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    loss = network(images).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("epoch", [0, 1])
def test_only_the_named_blocks_change(network, epoch):
    """Weights and BatchNorm statistics of what is frozen are the same to the bit after training steps."""
    plan = phases(preset="last_n", last_n=1, unfreeze_epoch=1)
    apply(network, plan, epoch, "update")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        step(network, optimizer)
    changed = {name for name, value in network.state_dict().items() if not value.equal(before[name])}
    learns = ("head.", "backbone.layer4.") if epoch else ("head.",)
    assert changed == {name for name in before if name.startswith(learns)}


def test_frozen_blocks_run_in_eval_mode_and_keep_no_activations(network):
    def saved_elements() -> int:
        count = 0

        def note(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
        return count

    apply(network, phases(preset="full"), 0, "update")
    everything = saved_elements()
    apply(network, phases(preset="head_only"), 0, "update")
    assert saved_elements() < everything / 100
    assert not any(module.training for module in network.backbone.modules())


def test_batchnorm_keep_leaves_the_statistics_where_weights_learn(network):
    apply(network, phases(preset="full"), 0, "keep")
    norm, weight = network.backbone.bn1, network.backbone.bn1.weight.detach().clone()
    mean = norm.running_mean.clone()
    step(network, torch.optim.SGD(network.parameters(), lr=0.01))
    assert norm.running_mean.equal(mean)
    assert not norm.weight.equal(weight)
    apply(network, phases(preset="full"), 0, "update")
    step(network, torch.optim.SGD(network.parameters(), lr=0.0))
    assert not norm.running_mean.equal(mean)


def test_the_append_heads_backbone_keeps_its_classifier_frozen():
    network = build_network(Architecture("resnet18", "append", 3), SMALL)
    names = blocks(network.backbone)
    assert names[-1] == "fc"
    apply(network, phases(names=names, preset="last_n", last_n=1, unfreeze_epoch=1), 0, "update")
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_the_callback_sets_the_momentum_of_batchnorm():
    from types import SimpleNamespace

    from src.callbacks.freezing import FreezingSchedule

    network = build_network(Architecture("resnet18", "linear", 3), SMALL)
    for layer in network.backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.01
    callback = FreezingSchedule({0: ["head"]}, "update", 0.1)
    callback.setup(SimpleNamespace(current_epoch=0), SimpleNamespace(network=network), "fit")
    assert network.backbone.bn1.momentum == 0.1
    assert not network.backbone.conv1.weight.requires_grad
