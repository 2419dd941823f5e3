"""Adapters: the network is unchanged at first, only they and the head learn, and the merged network is a plain one."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from src.config import Freeze, Optimizer
from src.engine.memory.gradient_checkpoints import checkpoint_gradients
from src.engine.runs.checkpoint_selection import WeightAverage, epoch_file, network_weights
from src.engine.runs.checksum import save_with_checksum
from src.engine.runs.errors import UserError
from src.engine.runs.selection import average_of_epochs
from src.engine.steps.precision import autocast
from src.engine.weights.low_rank import add_adapters, is_adapter, merge, merged
from src.engine.weights.weight_files import read_tensors
from src.models.backbones import blocks
from src.models.freezing import FreezePlan
from src.models.network import TransferNetwork
from src.models.optimizers import build_optimizer
from tests.engine.runs.small_training import SQUARE, classifier, fit, freezing

WIDTH, RANK = 16, 2
IMAGES = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SMALL = {"img_size": 8, "patch_size": 2, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 0}


def vit(dropout: float = 0.0) -> nn.Module:
    vit = torchvision.models.VisionTransformer(8, 2, 2, 2, WIDTH, 32, dropout, dropout)
    vit.heads = nn.Identity()
    return vit


def swin() -> nn.Module:
    swin = torchvision.models.SwinTransformer([2, 2], WIDTH, [2], [2], [2, 2], stochastic_depth_prob=0.0)
    swin.head = nn.Identity()
    return swin


BACKBONES = {  # and how many weights of each get an adapter
    "torchvision's vit": (vit, 4),
    "torchvision's swin": (swin, 4),
    "timm's vit": (lambda: timm.models.vision_transformer.VisionTransformer(**SMALL), 4),
    "timm's beit": (lambda: timm.models.beit.Beit(**SMALL), 4),
    "timm's eva": (lambda: timm.models.eva.Eva(**SMALL, qkv_fused=False), 8),
}


def network(backbone: nn.Module | None = None) -> TransferNetwork:
    """With random weights everywhere: torchvision's vit begins with zeros in its head."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return TransferNetwork(backbone or vit(), nn.Linear(WIDTH, 3), SQUARE)


def adapted(backbone: nn.Module | None = None, seed: int = 0) -> TransferNetwork:
    """In the state of its first epoch."""
    made = network(backbone)
    add_adapters(made.backbone, RANK, seed)
    FreezePlan.of(Freeze(lora_rank=RANK), made.backbone, 1).apply(made, 0)
    return made


def train(made: TransferNetwork, steps: int = 2) -> None:
    optimizer = build_optimizer(made, Optimizer(name="adamw", lr=0.01))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(IMAGES), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()


@pytest.mark.parametrize("name", BACKBONES)
def test_from_the_first_step_to_the_merged_network(name):
    build, number = BACKBONES[name]
    torch.manual_seed(0)
    backbone = build()
    plain, made = network(copy.deepcopy(backbone)).eval(), adapted(backbone)
    assert sum(name.endswith("lora.up_weight") for name in made.state_dict()) == number
    assert made(IMAGES).equal(plain(IMAGES)), "adapters that have not learned change the outputs"

    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    train(made)
    learned = {name for name, tensor in made.state_dict().items() if not tensor.equal(before[name])}
    assert learned == {name for name in before if is_adapter(name) or name.startswith("head.")}
    assert {name for name, parameter in made.named_parameters() if parameter.grad is not None} == learned
    with torch.no_grad():  # here torch's attention takes a path of its own
        outputs = made(IMAGES)
    assert not outputs.allclose(plain(IMAGES), rtol=1e-3)

    state = merged(made.state_dict())
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()
    }
    plain.load_state_dict(state)
    merge(made)
    with torch.no_grad():
        assert plain(IMAGES).equal(outputs)
        assert made(IMAGES).equal(outputs)
    assert repr(made) == repr(plain)
    assert {name: tensor.sum() for name, tensor in made.state_dict().items()} == {
        name: tensor.sum() for name, tensor in state.items()
    }


def test_a_frozen_block_is_in_eval_mode_where_adapters_learn():
    made = adapted(vit(dropout=0.5))
    layers = [layer for layer in made.backbone.modules() if isinstance(layer, nn.Dropout | nn.MultiheadAttention)]
    assert not any(layer.training for layer in layers)
    assert made(IMAGES).equal(made(IMAGES))


def test_phases_may_train_adapters_later_and_blocks_too():
    made = adapted()
    phases = {0: ["head"], 1: ["lora"], 2: ["encoder.ln"]}
    plan = FreezePlan.of(Freeze(lora_rank=RANK, phases=phases), made.backbone, 3)
    assert [plan.backbone_is_frozen(epoch) for epoch in range(3)] == [True, False, False]
    learn = []
    for epoch in range(3):
        plan.apply(made, epoch)
        learn.append({name for name, parameter in made.backbone.named_parameters() if parameter.requires_grad})
    assert learn[0] == set()
    assert all(map(is_adapter, learn[1]))
    assert learn[2] - learn[1] == {"encoder.ln.weight", "encoder.ln.bias"}
    assert "from epoch 1: head and adapters, " in plan.described(made)


def test_every_seed_has_adapters_of_its_own_whatever_was_drawn_before():
    states = [adapted(seed=seed).state_dict() for seed in (0, 0, 1)]
    drawn = [name for name in states[0] if name.endswith("lora.down_weight")]
    assert len({states[0][name].sum().item() for name in drawn}) == len(drawn), "two adapters begin alike"
    assert all(states[0][name].equal(states[1][name]) for name in drawn)
    assert not any(states[0][name].equal(states[2][name]) for name in drawn)


def test_a_backbone_without_attention_is_refused():
    with pytest.raises(UserError) as error:
        add_adapters(torchvision.models.resnet18(), 8, 0)
    assert all(word in error.value.render() for word in ("no attention", "vit_b_16", "swin_"))
    plain = network()
    add_adapters(plain.backbone, 0, 0)
    assert not any("lora" in name for name in plain.state_dict())


def test_in_bf16_the_merged_network_gives_the_same():
    """Weights are added in fp32, before autocast rounds them."""
    made = adapted()
    train(made)
    plain = network().eval()
    plain.load_state_dict(merged(made.state_dict()))
    with torch.no_grad(), autocast("bf16", torch.device("cpu")):
        assert made(IMAGES).equal(plain(IMAGES))


@pytest.mark.needs("dp")
@pytest.mark.parametrize("chunks", [1, 2])
def test_gradients_of_replicas_and_of_activations_that_are_computed_twice(chunks):
    from src.engine.dp.replication import on_cpu

    made, other = adapted(), network()
    train(made)
    made.zero_grad()
    checkpoint_gradients(other.backbone, blocks(other.backbone))
    add_adapters(other.backbone, RANK, 0)
    FreezePlan.of(Freeze(lora_rank=RANK), other.backbone, 1).apply(other, 0)
    other.load_state_dict(made.state_dict())
    made(IMAGES).square().sum().backward()
    on_cpu(other, IMAGES, [4 // chunks] * chunks, torch.enable_grad).square().sum().backward()
    for (name, parameter), twin in zip(made.named_parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (twin.grad is None), name
        if parameter.grad is not None:
            assert (parameter.grad - twin.grad).abs().max() < 1e-4 * parameter.grad.abs().max(), name


def test_copies_are_independent():
    made = adapted()
    twin = copy.deepcopy(made)
    train(twin)
    merge(twin)
    assert made(IMAGES).equal(adapted()(IMAGES))


def test_the_moving_average_is_that_of_merged_weights():
    """The mean of up @ down is not the product of their means."""
    model = classifier(2)
    model.network = adapted()
    callback, seen = WeightAverage(0.99), []

    class Notes(WeightAverage):
        def on_train_batch_end(self, trainer, pl_module, *args, **kwargs):
            seen.append({name: tensor.clone() for name, tensor in merged(pl_module.network.state_dict()).items()})

    fit(model, 2, freezing(2, lora_rank=RANK), callback, Notes(0.5))
    expected = {name: tensor.double() for name, tensor in seen[0].items()}
    for step, state in enumerate(seen[1:], 1):
        decay = min(0.99, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in state}
    average = callback.weights()
    assert average.keys() == network().state_dict().keys()
    assert all(average[name].double().allclose(tensor, atol=1e-6) for name, tensor in expected.items())


def test_averages_of_epochs_and_weights_files_are_merged(tmp_path):
    merged_states = []
    for epoch in range(2):
        made = adapted()
        train(made, 3 + 4 * epoch)
        content = {f"network.{name}": tensor for name, tensor in made.state_dict().items()}
        with epoch_file(tmp_path, epoch).open("wb") as file:
            save_with_checksum({"epoch": epoch, "global_step": 0, "state_dict": content}, file)
        merged_states.append(merged(made.state_dict()))
    name, average = average_of_epochs(tmp_path, [0, 1], merged_states[0])
    assert name == "the average of epochs 1, 2"
    assert average.keys() == network().state_dict().keys()
    for name, tensor in average.items():
        assert tensor.allclose((merged_states[0][name] + merged_states[1][name]) / 2, atol=1e-6)
    assert network_weights(epoch_file(tmp_path, 1)).keys() == average.keys()
    named = {f"state_dict.network.{name}" for name in average}
    assert named <= read_tensors(epoch_file(tmp_path, 1)).keys(), "as model.weights takes it"
