"""What is frozen stays as it was, to the bit; what is trained when follows from the epoch alone."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from src.callbacks.freezing import FreezingSchedule
from src.config import Freeze
from src.engine.runs.errors import UserError
from src.engine.steps.engine_module import EngineModule
from src.engine.weights.preprocessing import Preprocessing
from src.models.backbones import blocks
from src.models.freezing import FreezePlan
from src.models.network import Architecture, build_network
from tests.engine.runs import small_training
from tests.engine.runs.small_training import classifier, fit, freezing

SMALL = Preprocessing(32, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RESNET_BLOCKS = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]


@pytest.fixture
def network():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build_network(Architecture("resnet18", "linear", 3), SMALL)


@functools.cache
def resnet18():
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    return backbone


def plan(max_epochs=100, backbone=None, **settings):
    return FreezePlan.of(Freeze(**settings), backbone or resnet18(), max_epochs)


def phases(max_epochs=100, **settings):
    return plan(max_epochs, **settings).phases


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


def test_a_phase_that_never_comes_is_said(caplog):
    phases(max_epochs=4, preset="gradual", last_n=3, unfreeze_epoch=1)
    assert not caplog.messages
    phases(max_epochs=3, preset="gradual", last_n=3, unfreeze_epoch=1)
    assert "the phase of epoch 3 is never reached" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"phases": {0: ["layer4"]}}, "no phase that is reached trains the head"),
        ({"phases": {0: ["layer4"], 200: ["head"]}}, "no phase that is reached trains the head"),
        ({"phases": {0: ["layer4"], 2: ["head"]}}, "the head is not trained before epoch 2"),
        ({"phases": {0: ["all"], 2: ["layer4"]}}, "the phase of epoch 2 changes nothing"),
        ({"phases": {0: ["head", "layer4"], 1: ["layer4.1", "head"]}}, "the phase of epoch 1 changes nothing"),
    ],
)
def test_what_is_hardly_meant_is_said(settings, said, caplog):
    phases(**settings)
    assert len(caplog.messages) == 1 + (200 in settings.get("phases", {}))
    assert said in caplog.text


class Untrained(EngineModule):
    """What the callback looks at: a network, and where it is said to be."""

    device = torch.device("cpu")

    def __init__(self, network: nn.Module, device: str = "cpu") -> None:
        L.LightningModule.__init__(self)
        self.network, self.device = network, torch.device(device)


def test_batchnorm_that_is_not_there_cannot_be_kept(caplog):
    model = Untrained(nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)}))
    trainer = SimpleNamespace(current_epoch=0, is_global_zero=True)
    FreezingSchedule(FreezePlan({0: ["head"]}, 1)).setup(trainer, model, "fit")
    assert not caplog.messages
    FreezingSchedule(FreezePlan({0: ["head"]}, 1, "keep")).setup(trainer, model, "fit")
    assert "freeze.batchnorm=keep has no effect" in caplog.text


def test_usual_phases_say_nothing(caplog):
    for settings in ({}, {"preset": "full"}, {"preset": "gradual"}, {"preset": "head_only"}, {"last_n": 1000}):
        phases(**settings)
    phases(phases={0: ["head"], 1: ["layer4.1"], 2: ["layer4"], 3: ["all"]})
    assert not caplog.messages


def test_the_first_lines_say_what_is_trained_from_which_epoch(network):
    def said(max_epochs: int = 9, **settings: object) -> str:
        return plan(max_epochs, **settings).described(network)

    assert said() == "epoch 0 (the first): head; from epoch 1: head and 100 % of the backbone (all 6 blocks)"
    assert said(last_n=1) == "epoch 0 (the first): head; from epoch 1: head and 75 % of the backbone (1 of 6 blocks)"
    assert said(last_n=5).endswith("99 % of the backbone (5 of 6 blocks)"), "all but the first convolution"
    assert said(preset="head_only") == "epoch 0 (the first): head"
    assert said(1) == "epoch 0 (the first): head", "a phase that is never reached"
    assert said(phases={0: ["conv1"]}) == "epoch 0 (the first): 0.08 % of the backbone (1 of 6 blocks)"
    assert said(preset="gradual").count("from epoch") == 2, "seven phases: the first two and the last"


def test_phases_name_blocks_parts_and_patterns():
    given = {4: ["all"], 0: ["head"], 1: ["layer4.1"], 2: ["layer[34]"], 3: ["last_3"], 5: ["backbone.layer1"]}
    assert list(phases(phases=given)) == [0, 1, 2, 3, 4, 5]
    assert phases(phases=given)[1] == ["backbone.layer4.1"]
    assert phases(phases=given)[2] == ["backbone.layer3", "backbone.layer4"]
    assert phases(phases=given)[3] == ["backbone.layer2", "backbone.layer3", "backbone.layer4"]
    assert phases(phases=given)[5] == ["backbone.layer1"]
    with pytest.raises(UserError) as error:
        phases(phases={0: ["head"], 1: ["layer5"]})
    assert "conv1, bn1, layer1" in error.value.render()


@pytest.mark.parametrize("word", ["layer4.7", "last_0", "last_", "layer", 4])
def test_a_name_that_trains_nothing_is_refused(word):
    with pytest.raises(UserError, match=f"'{word}'"):
        phases(phases={0: ["head"], 1: [word]})


def test_the_trainable_set_is_a_function_of_the_epoch(network):
    gradual = plan(preset="gradual", last_n=2, unfreeze_epoch=1)
    for epoch in (0, 3, 1, 2, 0):  # in any order: a resumed run jumps
        gradual.apply(network, epoch)
        names = tuple(gradual.trainable(epoch))
        for name, parameter in network.named_parameters():
            assert parameter.requires_grad == name.startswith(tuple(f"{own}." for own in names)), (epoch, name)


def step(network, optimizer):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    loss = network(images).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Recorder(L.Callback):
    """What changed in each epoch, and what the backbone made of the same images after each step, in train mode."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []
        self.features: list[torch.Tensor] = []
        self._before: dict[str, torch.Tensor] = {}

    def on_train_epoch_start(self, trainer, pl_module):
        self._before = {name: value.clone() for name, value in pl_module.network.state_dict().items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *args):
        self.features.append(pl_module.network.features(torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)))

    def on_train_epoch_end(self, trainer, pl_module):
        after = pl_module.network.state_dict()
        self.changed.append({name for name, value in after.items() if not value.equal(self._before[name])})


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({"preset": "head_only"}, ["head", "head", "head"]),
        ({"preset": "last_n", "last_n": 1}, ["head", "head layer2", "head layer2"]),
        ({"preset": "gradual", "last_n": 2}, ["head", "head layer2", "head layer2 layer1"]),
        ({"preset": "full"}, ["head stem layer1 layer2"] * 3),
        ({"phases": {0: ["head"], 2: ["layer1.1"]}}, ["head", "head", "head layer1.1"]),
    ],
    ids=["head_only", "last_n", "gradual", "full", "phases"],
)
def test_exactly_the_named_blocks_change_in_each_phase(settings, learns):
    """All of their weights and BatchNorm statistics do; everything else stays the same to the bit."""
    recorder = Recorder()
    model = classifier(3)
    fit(model, 3, freezing(3, **settings), recorder)
    names = list(model.network.state_dict())
    for changed, words in zip(recorder.changed, learns, strict=True):
        own = tuple("head." if word == "head" else f"backbone.{word}." for word in words.split())
        assert changed == {name for name in names if name.startswith(own)}


def test_frozen_features_are_the_same_to_the_bit_in_every_step():
    recorder = Recorder()
    fit(classifier(), 3, freezing(preset="last_n", unfreeze_epoch=2), recorder)
    frozen, last = recorder.features[:8], recorder.features[-1]
    assert all(features.equal(frozen[0]) for features in frozen)
    assert not last.equal(frozen[0])


class SaveAll(Checkpoint):
    """In the middle and at the end of every epoch, where Lightning's ModelCheckpoint saves too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-middle.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-end.ckpt")


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "plateau", "constant"])
def test_a_continued_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, schedule):
    """Continued from everywhere around two changes of phase, and around the epochs in which the plateau lowers lr."""

    def train(resume=None):
        # With so small an lr no prediction changes: the plateau's third bad epoch is epoch 3, and again epoch 5 or 6.
        model = classifier(6, schedule=schedule, lr=1e-5, lr_decay=0.5, warmup_fraction=0.5)
        callbacks = [freezing(6, preset="gradual", last_n=2, unfreeze_epoch=2)] + [SaveAll(tmp_path)] * (not resume)
        trainer = fit(model, 6, *callbacks, resume=resume)
        return model.state_dict(), [group["lr"] for group in trainer.optimizers[0].param_groups]

    weights, rates = train()
    for place in ("0-end", "1-middle", "1-end", "2-middle", "2-end", "3-end", "4-middle"):
        again, rates_again = train(resume=tmp_path / f"{place}.ckpt")
        assert rates_again == rates, place
        assert all(tensor.equal(again[name]) for name, tensor in weights.items()), place


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

    plan(preset="full").apply(network, 0)
    everything = saved_elements()
    plan(preset="head_only").apply(network, 0)
    assert saved_elements() < everything / 100
    assert not any(module.training for module in network.backbone.modules())


def test_batchnorm_keep_leaves_the_statistics_where_weights_learn(network):
    plan(preset="full", batchnorm="keep").apply(network, 0)
    norm, weight = network.backbone.bn1, network.backbone.bn1.weight.detach().clone()
    mean = norm.running_mean.clone()
    step(network, torch.optim.SGD(network.parameters(), lr=0.01))
    assert norm.running_mean.equal(mean)
    assert not norm.weight.equal(weight)
    plan(preset="full").apply(network, 0)
    step(network, torch.optim.SGD(network.parameters(), lr=0.0))
    assert not norm.running_mean.equal(mean)


def test_the_append_heads_backbone_keeps_its_classifier_frozen():
    network = build_network(Architecture("resnet18", "append", 3), SMALL)
    assert blocks(network.backbone)[-1] == "fc"
    plan(backbone=network.backbone, preset="last_n", last_n=1, unfreeze_epoch=1).apply(network, 0)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_a_layer_without_weights_goes_with_the_layer_before_it():
    """Dropout is on where the block before it learns, and off behind the backbone's last one: model.dropout is for that."""
    network, stem, layer1, layer2 = small_training.network(), *(small_training.block(width) for width in (3, 8, 8))
    layers = {"first": nn.Dropout(), "stem": stem, "layer1": layer1, "between": nn.Dropout(), "layer2": layer2}
    network.backbone = nn.Sequential(OrderedDict(layers, last=nn.Dropout()))
    network.backbone.position = nn.Parameter(torch.zeros(1))  # frozen, before everything: a ViT's position embedding
    network.head = nn.Sequential(nn.Dropout(0.5), network.head)

    def on(**settings) -> set[str]:
        small_training.plan(**settings).apply(network, 0)
        return {name for name, layer in network.named_modules() if isinstance(layer, nn.Dropout) and layer.training}

    assert on(preset="head_only") == {"head.0"}
    assert on(phases={0: ["head", "layer2"]}) == {"head.0"}
    assert on(phases={0: ["head", "layer1"]}) == {"head.0", "backbone.between"}
    assert on(preset="full") == {"head.0", "backbone.between"}
    assert on(phases={0: ["layer1", "layer2"]}) == {"backbone.between"}


def test_the_callback_sets_the_momentum_of_batchnorm(network):
    for layer in network.backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.01
    callback = FreezingSchedule(FreezePlan({0: ["head"]}, 1), momentum=0.1)
    callback.setup(SimpleNamespace(current_epoch=0), Untrained(network), "fit")
    assert network.backbone.bn1.momentum == 0.1
    assert not network.backbone.conv1.weight.requires_grad


def test_a_change_of_phase_is_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="src"):
        fit(classifier(), 4, freezing(preset="gradual", last_n=2, unfreeze_epoch=1))
    said = [message for message in caplog.messages if "learn" in message]
    assert said == ["from here on these learn: head, layer2", "from here on these learn: head, layer2, layer1"]


def test_a_change_of_phase_empties_the_gpus_cache(network, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    callback = FreezingSchedule(FreezePlan({0: ["head"], 1: ["backbone.layer4"]}, 2))
    for epoch, device, count in ((0, "cuda", 1), (0, "cuda", 1), (1, "cuda", 2), (0, "cpu", 2)):
        trainer = SimpleNamespace(current_epoch=epoch, is_global_zero=True, strategy=SimpleNamespace(model=network))
        callback.on_train_epoch_start(trainer, Untrained(network, device))
        assert len(emptied) == count
