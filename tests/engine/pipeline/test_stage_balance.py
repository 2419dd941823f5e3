"""Where a ResNet50 is cut by itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from src.config import Config, Data, Model, Optimizer, Precision, Strategy
from src.engine.pipeline import stage_balance
from src.engine.pipeline.stage_balance import best_cuts, choose_split, measure
from src.engine.runs.errors import UserError
from src.engine.weights.preprocessing import Preprocessing
from src.models.model_parallel_resnet50 import BLOCKS, ModelParallelResNet50
from src.models.network import TransferNetwork
from src.models.optimizers import build_optimizer
from tests.conftest import parses

CPU = torch.device("cpu")


def config(split_at: str = "auto", micro_batches: int = 4, schedule: str = "1f1b", optimizer: str = "adamw") -> Config:
    return Config(
        data=Data(batch_size=7),
        model=Model(split_at=split_at),
        optimizer=Optimizer(name=optimizer, lr=0.1),
        strategy=Strategy(name="model_parallel", micro_batches=micro_batches, schedule=schedule),
        precision=Precision(name="fp32"),
    )


def network() -> TransferNetwork:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = ModelParallelResNet50(split_at=[])
    backbone.fc = nn.Identity()
    head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2048, 3))
    return TransferNetwork(backbone, head, Preprocessing(32, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


def task(net: TransferNetwork) -> Any:
    """What is asked of a run's task. The network learns as it stands."""
    return SimpleNamespace(
        network=net,
        preprocessing=SimpleNamespace(image_size=32),
        freezing=SimpleNamespace(apply_last=lambda network: None),
        optimizer=lambda config, network: build_optimizer(network, config.optimizer, config.freeze.lr_decay),
    )


def test_the_best_cuts():
    assert best_cuts([[1, 1, 1, 1]] * 2) == (2,)
    assert best_cuts([[1, 1, 1, 5]] * 2) == (3,)
    assert best_cuts([[1, 9, 1, 1, 1, 1]] * 3) == (1, 2)
    assert best_cuts([[9, 1, 1, 1, 1]] * 3) == (1, 3)  # the largest stage is what it is: the others are alike
    assert best_cuts([[1, 1, 1]]) == ()
    assert best_cuts([[4, 4, 4, 4], [1, 1, 1, 1]]) == (1,)  # what costs more in the first stage


def test_a_slow_block_has_a_stage_of_its_own(caplog, monkeypatch):
    slow = network()
    slow.backbone.layer3[2].slow = True
    seconds = stage_balance._seconds

    def in_slow_motion(stage, *rest):
        """Far slower than other programs could make the others."""
        return seconds(stage, *rest) + (100 if any(hasattr(layer, "slow") for layer in stage.modules()) else 0)

    monkeypatch.setattr(stage_balance, "_seconds", in_slow_motion)
    with caplog.at_level("INFO"):
        assert choose_split(config(), task(slow), CPU, 3) == ["layer3.1", "layer3.2"]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("model.split_at=auto: [layer3.1,layer3.2]; the stages have ")
    assert caplog.messages[0].endswith(" % of the time")


def test_what_is_frozen_costs_only_a_forward_pass(monkeypatch):
    backward: list[int] = []
    monkeypatch.setattr(stage_balance, "TIMED", 1)
    tuned = network()
    tuned.backbone.requires_grad_(False)
    tuned.backbone.layer3[5].requires_grad_(True)
    for number, block in enumerate(BLOCKS[1:]):
        layer = tuned.backbone.get_submodule(block)
        layer.register_full_backward_hook(lambda layer, inputs, outputs, number=number: backward.append(number))
    blocks = measure(config(), task(tuned), CPU)
    names = ["first layers", *BLOCKS[1:], "layer4.2"]
    assert {BLOCKS[1:][number] for number in backward} == {"layer3.5", "layer4.0", "layer4.1"}
    assert {name for name, block in zip(names, blocks, strict=True) if block.activations} == {
        *("layer3.5", "layer4.0", "layer4.1", "layer4.2")
    }


def test_nothing_is_different_afterwards():
    net = network()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    measure(config(), task(net), CPU)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert net.backbone.split_at == ()


def test_memory_is_weights_gradients_states_and_activations():
    net = network()
    blocks = measure(config(micro_batches=4), task(net), CPU)  # 7 images in 4 micro-batches: two in the largest
    weights = [sum(weight.nbytes for weight in net.backbone.get_submodule(name).parameters()) for name in BLOCKS[1:]]
    for block, size in zip(blocks[1:-1], weights, strict=True):
        assert block.fixed == pytest.approx(4 * size, rel=0.01)  # AdamW has two numbers for each
    sgd = measure(config(micro_batches=2, optimizer="sgd"), task(net), CPU)
    assert sgd[5].fixed == pytest.approx(2 * weights[4], rel=0.01)
    assert sgd[5].activations == pytest.approx(2 * blocks[5].activations, rel=0.05)
    # layer1.1 at 8 x 8 pixels in 32-bit floats: before BatchNorm, and after the ReLU that follows it
    assert blocks[2].activations == pytest.approx(2 * 4 * 64 * 2 * (64 + 64 + 256), rel=0.05)


def test_memory_counts_as_many_micro_batches_as_a_stage_keeps(monkeypatch):
    """With 1f1b the first stage keeps more than the last, with gpipe all keep all."""
    even = [stage_balance.Measured(0.0, 0, 100)] * 17
    monkeypatch.setattr(stage_balance, "measure", lambda *arguments: even)
    assert choose_split(config("auto_memory", schedule="gpipe"), task(network()), CPU, 2) == [BLOCKS[7]]
    assert choose_split(config("auto_memory"), task(network()), CPU, 2) == [BLOCKS[4]]  # 5 blocks twice, 12 once
    assert choose_split(config("auto_memory", micro_batches=1), task(network()), CPU, 2) == [BLOCKS[7]]


def test_more_stages_than_blocks(monkeypatch):
    words = "model=model_parallel_resnet50 strategy=model_parallel model.split_at=auto trainer.devices=18"
    monkeypatch.setenv("TRAIN_COMMAND", f"python -m src.train {words}")
    with pytest.raises(UserError, match="cannot be cut into 18 stages") as caught:
        choose_split(config(), task(network()), CPU, 18)
    (fix,) = caught.value.fix
    assert fix == f"python -m src.train {words.replace('18', '17')}"
    assert parses(fix.removeprefix("python -m src.train ").split())
