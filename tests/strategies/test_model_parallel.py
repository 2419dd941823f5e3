"""strategy=model_parallel: the same result as one device, to the bit where the micro-batches are the same."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

from src.callbacks.averaging import WeightAverage
from src.callbacks.freezing import FreezingSchedule
from src.callbacks.out_of_memory import OutOfMemory
from src.config import Data, Optimizer
from src.data.module import PictureData
from src.data.pictures import Pictures
from src.errors import UserError
from src.models.classifier import Classifier
from src.models.losses import ClassificationLoss
from src.models.model_parallel_resnet50 import ModelParallelResNet50
from src.models.network import TransferNetwork
from src.preprocessing import Preprocessing
from src.strategies.model_parallel import build_model_parallel
from src.strategies.stage_threads import StageThreads, operations

TWO, THREE = ["layer2"], ["layer1", "layer3"]
ALL, HEAD = {0: ["backbone", "head"]}, {0: ["head"]}


class Narrow(ModelParallelResNet50):
    """Thin inside of its blocks, which makes it ten times quicker. With statistics that are not those of the pictures a
    block's output would grow, and grow again in the next."""

    def __init__(self, split_at: list[str]) -> None:
        ResNet.__init__(self, Bottleneck, [3, 4, 6, 3], width_per_group=4)
        self.fc = nn.Identity()
        for block in self.modules():
            if isinstance(block, Bottleneck):
                nn.init.constant_(block.bn3.weight, 0.2)
        self.split(split_at)


# The schedule, with the same micro-batches one after another beside it.


def test_orders_of_the_schedules():
    f, b = [("forward", i) for i in range(4)], [("backward", i) for i in range(4)]
    assert [operations("gpipe", 2, stage, 4) for stage in (0, 1)] == [f + b, f + b]
    assert operations("1f1b", 2, 0, 4) == [f[0], f[1], b[0], f[2], b[1], f[3], b[2], b[3]]
    assert operations("1f1b", 2, 1, 4) == [f[0], b[0], f[1], b[1], f[2], b[2], f[3], b[3]]
    assert operations("1f1b", 8, 0, 4) == f + b
    assert operations("1f1b", 3, 0, 1) == [f[0], b[0]]


def torchvisions() -> ResNet:
    """The same weights at every call."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return resnet50(num_classes=10)


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
    network = ModelParallelResNet50(num_classes=10, split_at=split_at)
    network.load_state_dict(torchvisions().state_dict())
    return network


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = found[name] is None if value is None else torch.equal(found[name], value)
        assert same, name


@pytest.mark.parametrize("split_at", [TWO, THREE])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_micro_batches_in_stages_are_those_one_after_another(m, schedule, split_at):
    assert_same(in_stages(split(split_at), schedule, m), unsplit(m))


def test_with_fixed_statistics_micro_batches_are_the_whole_batch():
    whole = one_after_another(torchvisions().eval(), 1)
    parts = in_stages(split(TWO).eval(), "1f1b", 4)
    for name, weight in torchvisions().named_parameters():
        expected = whole[f"{name}.grad"]
        assert torch.linalg.norm(parts[f"{name}.grad"] - expected) <= 1e-3 * torch.linalg.norm(expected), weight.shape


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


def stage_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stage")]


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


# Training, with the project's own classifier on a narrow ResNet50.


SMALL = Preprocessing(32, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def classifier(split_at: list[str] = TWO, weights: list[float] | None = None, **optimizer: Any) -> Classifier:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2048, 3))
    network = TransferNetwork(Narrow(split_at), head, SMALL)
    settings = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "schedule": "constant", "warmup_fraction": 0.0}
    return Classifier(
        network,
        ClassificationLoss("multiclass", weights),
        Optimizer(**settings | optimizer),
        num_classes=3,
        total_steps=6,
        seed=0,
        hparams={},
    )


def data() -> PictureData:
    """Three steps per epoch, of 8, 8 and 4 pictures."""
    labels = [index % 3 for index in range(26)]
    noise = torch.randint(0, 100, (26, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = noise + 50 * torch.tensor(labels, dtype=torch.uint8)[:, None, None, None]
    splits = {"train": list(range(20)), "val": list(range(20, 26)), "test": []}
    pictures = Pictures(
        ("a", "b", "c"), [str(i) for i in range(26)], labels, splits, lambda i: pixels[i], in_memory=True
    )
    return PictureData(Data(augment="none", batch_size=8, num_workers=0), pictures, SMALL, seed=0)


def fit(
    model: Classifier, strategy: Any, *callbacks: L.Callback, epochs: int = 1, batchnorm: str = "keep", **settings: Any
) -> L.Trainer:
    """Trains all layers; batchnorm='keep': with statistics that stay, so that a picture's result is its own."""
    resume, phases = settings.pop("resume", None), settings.pop("phases", ALL)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if strategy is None else len(model.network.backbone.split_at) + 1,
        strategy=strategy or SingleDeviceStrategy("cpu"),
        max_epochs=epochs,
        callbacks=[FreezingSchedule(phases, batchnorm), *callbacks],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, data(), ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def trained(strategy: Any, *callbacks: L.Callback, **settings: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights and the metrics after an epoch."""
    of_model = {name: settings.pop(name) for name in ("weights", "name", "momentum", "split_at") if name in settings}
    model = classifier(**of_model)
    trainer = fit(model, strategy, *callbacks, **settings)
    return model.network.state_dict(), {name: float(value) for name, value in trainer.callback_metrics.items()}


def relative_change(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The difference of two results of training, as a share of what training changed."""
    start = classifier().network.state_dict()
    names = [name for name, value in start.items() if value.is_floating_point()]
    difference = sum((found[name] - expected[name]).square().sum() for name in names)
    return float((difference / sum((expected[name] - start[name]).square().sum() for name in names)).sqrt())


def test_one_micro_batch_is_training_on_one_device():
    """Dropout, BatchNorm's statistics, metrics and all."""
    alone, its_metrics = trained(None, batchnorm="update", name="adamw", momentum=None)
    strategy = build_model_parallel(1, "1f1b")
    split, metrics = trained(strategy, batchnorm="update", name="adamw", momentum=None, split_at=THREE)
    assert_same(split, alone)
    assert metrics == its_metrics


@functools.cache
def whole_batches(*weights: float, clip: float | None = None) -> tuple[dict[str, Tensor], dict[str, float]]:
    torch.manual_seed(0)
    return trained(None, weights=list(weights) or None, gradient_clip_val=clip)


@pytest.fixture
def no_dropout(monkeypatch):
    """Whole batches and micro-batches draw in another order on CPUs: compare them without it."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_eight_micro_batches_are_one_batch(no_dropout, schedule):
    """Also of the last batch, which has four pictures."""
    weights, metrics = trained(build_model_parallel(8, schedule))
    expected, their_metrics = whole_batches()
    assert relative_change(weights, expected) < 1e-3
    assert metrics == pytest.approx(their_metrics, rel=1e-3)


def test_uneven_micro_batches_count_with_the_weights_of_their_classes(no_dropout):
    weights, metrics = trained(build_model_parallel(3, "1f1b"), weights=[0.2, 1.0, 5.0])
    expected, their_metrics = whole_batches(0.2, 1.0, 5.0)
    assert relative_change(weights, expected) < 1e-3
    assert metrics["train/loss"] == pytest.approx(their_metrics["train/loss"], rel=1e-4)


def test_gradients_are_clipped(no_dropout):
    weights, _ = trained(build_model_parallel(4, "1f1b"), gradient_clip_val=0.01)
    assert relative_change(weights, whole_batches(clip=0.01)[0]) < 1e-3
    assert relative_change(weights, whole_batches()[0]) > 0.3


def test_an_average_of_the_weights_is_kept(no_dropout):
    averages = []
    for strategy in (None, build_model_parallel(4, "1f1b")):
        average = WeightAverage(0.5)
        trained(strategy, average)
        averages.append(average.weights())
    assert relative_change(averages[1], averages[0]) < 1e-3


def test_only_the_head_learns(no_dropout):
    model = classifier()
    before = copy.deepcopy(model.network.state_dict())
    fit(model, build_model_parallel(4, "1f1b"), phases=HEAD)
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.1.weight", "head.1.bias"}
    assert all(weight.grad is None for weight in model.network.backbone.parameters())


@pytest.mark.parametrize("m", [1, 2])
def test_a_run_that_continues_ends_at_the_same_weights(tmp_path: Path, m):
    settings = {"name": "adamw", "momentum": None}
    straight = classifier(**settings)
    fit(straight, build_model_parallel(m, "1f1b"), epochs=2, batchnorm="update")
    half = fit(classifier(**settings), build_model_parallel(m, "1f1b"), epochs=1, batchnorm="update")
    half.save_checkpoint(tmp_path / "half.ckpt")
    keys = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert keys.keys() == classifier().state_dict().keys()
    continued = classifier(**settings)
    fit(continued, build_model_parallel(m, "1f1b"), epochs=2, batchnorm="update", resume=tmp_path / "half.ckpt")
    assert_same(continued.network.state_dict(), straight.network.state_dict())


def test_fp16_in_every_thread_with_a_loss_that_is_scaled_once(no_dropout):
    weights, kinds = [], set()
    for strategy in (None, build_model_parallel(4, "1f1b")):
        model = classifier()
        for block in (model.network.backbone.layer1[0], model.network.backbone.layer3[0]):
            block.conv1.register_forward_hook(lambda layer, inputs, output: kinds.add(output.dtype))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        fit(model, strategy, plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
        assert scaler.get_scale() == 1024.0
        weights.append(model.network.state_dict())
    assert kinds == {torch.float16}
    assert relative_change(weights[1], weights[0]) < 0.05


def test_memory_that_runs_out_ends_the_run_with_an_answer():
    model = classifier()

    def fail(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if model.training:
            raise torch.OutOfMemoryError("CUDA out of memory, it was said")

    model.network.backbone.layer3[0].register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="out of memory in step 1 with 8 pictures"):
        fit(model, build_model_parallel(4, "1f1b"), OutOfMemory("stop", 200))
    assert not stage_threads()


def test_one_micro_batch_that_does_not_fit_is_repeated_in_parts(no_dropout):
    def fail(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory, it was said")

    model = classifier()
    model.network.backbone.layer3[0].register_forward_pre_hook(fail)
    fit(model, build_model_parallel(1, "1f1b"), OutOfMemory("split", 200))
    assert relative_change(model.network.state_dict(), whole_batches()[0]) < 1e-3


# Where things are: tensors on the device meta have a shape and no values, and do not mix with those on a CPU.


def placed(strategy: Any, model: Classifier, devices: list[str]) -> None:
    strategy.parallel_devices = [torch.device(device) for device in devices]
    strategy.connect(model)
    strategy.model_to_device()


def test_what_comes_after_the_network_is_on_the_last_device():
    model, strategy = classifier(weights=[1.0, 2.0, 3.0]), build_model_parallel(1, "1f1b")
    placed(strategy, model, ["cpu", "meta"])
    images, labels = strategy.batch_to_device((torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4) % 3))
    output = model.training_step((images, labels), 0)
    assert (images.device.type, strategy.root_device.type, model.device.type) == ("cpu", "cpu", "cpu")
    after = (labels, *output.values(), model.loss.class_weights, model.loss_weight((images, labels)))
    assert {tensor.device.type for tensor in after} == {"meta"}
    assert {metrics.confusion.device.type for metrics in (model.train_metrics, model.val_metrics)} == {"meta"}


def test_the_optimizers_state_is_beside_its_parameter():
    model, strategy = classifier(name="adamw", momentum=None), build_model_parallel(1, "1f1b")
    placed(strategy, model, ["cpu", "meta"])
    strategy.optimizers, _ = model.configure_optimizers()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    strategy.optimizers[0].step()
    saved = strategy.optimizers[0].state_dict()
    strategy.optimizers, _ = model.configure_optimizers()
    strategy.load_optimizer_state_dict({"optimizer_states": [saved]})
    states = {(weight.device.type, of["exp_avg"].device.type) for weight, of in strategy.optimizers[0].state.items()}
    assert states == {("cpu", "cpu"), ("meta", "meta")}


def test_what_is_in_no_stage_is_not_forgotten():
    model = classifier()
    model.network.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(AssertionError, match=r"network\.temperature"):
        placed(build_model_parallel(1, "1f1b"), model, ["cpu", "cpu"])


def test_more_devices_than_stages():
    with pytest.raises(UserError, match="2 stages do not fit 3 devices") as caught:
        placed(build_model_parallel(4, "1f1b"), classifier(), ["cpu"] * 3)
    assert "trainer.devices=2" in caught.value.fix[0]
