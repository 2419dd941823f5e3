"""A batch in micro-batches through stages in threads: beside the same micro-batches one after another, to the bit."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models import resnet50
from torchvision.models.resnet import ResNet

from src.engine.pipeline.stage_threads import StageThreads, operations
from src.models.model_parallel_resnet50 import ModelParallelResNet50
from tests.engine.pipeline.narrow import THREE, TWO, Narrow, assert_same, stage_threads
from tests.tolerance import DOUBLE

Network = TypeVar("Network", bound=nn.Module)


def test_orders_of_the_schedules():
    f, b = [("forward", i) for i in range(4)], [("backward", i) for i in range(4)]
    assert [operations("gpipe", 2, stage, 4) for stage in (0, 1)] == [f + b, f + b]
    assert operations("1f1b", 2, 0, 4) == [f[0], f[1], b[0], f[2], b[1], f[3], b[2], b[3]]
    assert operations("1f1b", 2, 1, 4) == [f[0], b[0], f[1], b[1], f[2], b[2], f[3], b[3]]
    assert operations("1f1b", 8, 0, 4) == f + b
    assert operations("1f1b", 3, 0, 1) == [f[0], b[0]]


@functools.cache
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return resnet50(num_classes=10).state_dict()


def with_weights(build: Callable[..., Network], **arguments: Any) -> Network:
    """The same weights at every call: a copy, since drawing 25 million numbers takes longer than most of these tests."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        network = build(num_classes=10, **arguments)
    network.load_state_dict(copy.deepcopy(weights()), assign=True)
    return network.to(torch.get_default_dtype())


def torchvisions() -> ResNet:
    return with_weights(resnet50)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 32, 32, generator=generator), torch.randint(10, (16,), generator=generator)


def result(network: nn.Module, losses: Sequence[Tensor]) -> dict[str, Tensor]:
    """The losses of the micro-batches, every gradient and every statistic of BatchNorm."""
    gradients = {f"{name}.grad": weight.grad for name, weight in network.named_parameters()}
    return gradients | dict(network.named_buffers()) | {f"loss {i}": loss.detach() for i, loss in enumerate(losses)}


def one_after_another(network: nn.Module, m: int) -> dict[str, Tensor]:
    images, labels = batch()
    losses = []
    for part, targets in zip(images.chunk(m), labels.chunk(m), strict=True):
        losses.append(F.cross_entropy(network(part), targets) / m)
        losses[-1].backward()
    return result(network, losses)


@functools.cache
def unsplit(m: int) -> dict[str, Tensor]:
    return one_after_another(torchvisions(), m)


def in_stages(
    network: ModelParallelResNet50, schedule: str, m: int, context: Callable[[], Any] = nullcontext
) -> dict[str, Tensor]:
    images, labels = batch()
    losses: list[Tensor] = []

    def loss_of(i: int, logits: Tensor) -> Tensor:
        losses.append(F.cross_entropy(logits, labels.chunk(m)[i]) / m)
        return losses[-1]

    stages = network.stages()
    threads = StageThreads(len(stages), schedule, context)
    try:
        threads.run(stages, images.chunk(m), loss_of)
    finally:
        threads.close()
    return result(network, losses)


def split(split_at: list[str]) -> ModelParallelResNet50:
    return with_weights(ModelParallelResNet50, split_at=split_at)


@pytest.mark.parametrize(
    ("m", "schedule", "split_at"),
    [(1, "1f1b", TWO), (2, "gpipe", TWO), (8, "1f1b", TWO), *itertools.product((2, 4, 8), ("1f1b", "gpipe"), (THREE,))],
)
def test_micro_batches_in_stages_are_those_one_after_another(m, schedule, split_at):
    assert_same(in_stages(split(split_at), schedule, m), unsplit(m))


@pytest.mark.numbers
def test_with_fixed_statistics_micro_batches_are_the_whole_batch(float64):
    whole = one_after_another(torchvisions().eval(), 1)
    parts = in_stages(split(TWO).eval(), "1f1b", 4)
    for name, weight in torchvisions().named_parameters():
        expected = whole[f"{name}.grad"]
        assert torch.linalg.norm(parts[f"{name}.grad"] - expected) <= DOUBLE * torch.linalg.norm(expected), weight.shape


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_stage_that_is_frozen(frozen):
    """Of a stage in the middle the gradient goes on to the one before; before that of a frozen start nothing is done."""
    network = Narrow(THREE)
    reference = copy.deepcopy(network)
    of_stage = {id(weight) for weight in network.stages()[frozen].parameters()}
    names = [name for name, weight in network.named_parameters() if id(weight) in of_stage]
    for one in (network, reference):
        for name in names:
            one.get_parameter(name).requires_grad_(False)
    needed: list[bool] = []
    network.layer2[0].register_forward_pre_hook(lambda layer, inputs: needed.append(inputs[0].requires_grad))
    expected = one_after_another(reference, 4)
    assert_same(in_stages(network, "1f1b", 4), expected)
    assert expected[f"{names[0]}.grad"] is None
    assert needed == [frozen == 1] * 4


class Lost(Exception):
    """An error that nobody expects."""


class Kept:
    """A tensor that is kept for a backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output knows its graph, which knows this


def noting(kept: weakref.WeakSet[Kept]) -> Callable[[], saved_tensors_hooks]:
    """A context for the threads, in which all that is kept for backward passes is in that set as long as it lives."""

    def keep(tensor: Tensor) -> Kept:
        one = Kept(tensor)
        kept.add(one)
        return one

    return lambda: saved_tensors_hooks(keep, lambda one: one.tensor)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("where", ["layer1", "layer2", "layer4"])
def test_an_error_comes_out_as_itself_and_leaves_nothing(where, schedule):
    network, calls = Narrow(THREE), []

    def fail(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory, it was said")

    images, labels = batch()
    hook = network.get_submodule(where)[0].register_forward_pre_hook(fail)
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()
    stages, threads = network.stages(), StageThreads(3, schedule, noting(kept))

    def step() -> None:
        threads.run(stages, images.chunk(4), lambda i, logits: F.cross_entropy(logits, labels.chunk(4)[i]))

    with pytest.raises(torch.OutOfMemoryError, match="it was said") as caught:
        step()
    assert stage_threads()
    assert len(kept) > 0
    del caught
    gc.collect()
    assert len(kept) == 0

    hook.remove()
    network.zero_grad()
    step()  # the threads are as good as new
    assert all(weight.grad is not None for weight in network.parameters())
    threads.close()
    assert not stage_threads()


def test_an_error_in_a_backward_pass():
    network = Narrow(TWO)

    def fail(gradient: Tensor) -> None:
        raise Lost("in the first stage, on the way back")

    network.layer1[0].conv1.weight.register_hook(fail)
    with pytest.raises(Lost, match="way back"):
        in_stages(network, "1f1b", 4)
    assert not stage_threads()


def test_a_step_keeps_no_tensor():
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()
    gc.disable()  # a cycle would be memory that is held for a while
    try:
        in_stages(Narrow(TWO), "1f1b", 4, noting(kept))
        assert len(kept) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(("schedule", "most"), [("1f1b", 1), ("gpipe", 4)])
def test_how_many_micro_batches_a_stage_keeps(schedule, most):
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()
    network, alive = Narrow([]), []
    network.fc.register_forward_hook(lambda layer, inputs, output: alive.append(len(kept)))
    in_stages(network, schedule, 4, noting(kept))
    assert max(alive) / alive[0] == pytest.approx(most, rel=0.01)
