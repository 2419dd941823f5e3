"""strategy=model_parallel: the same result as one device, to the bit where the micro-batches are the same."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from src.callbacks.freezing import FreezingSchedule
from src.config import Data, Optimizer
from src.data.module import ImageData
from src.engine.images.labelled_images import LabelledImages
from src.engine.pipeline.model_parallel import build_model_parallel
from src.engine.runs.checkpoint_selection import WeightAverage
from src.engine.runs.errors import UserError
from src.engine.steps.engine_module import Training
from src.engine.steps.out_of_memory import OutOfMemory
from src.engine.weights.preprocessing import Preprocessing
from src.models.classifier import Classifier
from src.models.freezing import FreezePlan
from src.models.losses import ClassificationLoss
from src.models.network import TransferNetwork
from tests.engine.pipeline.narrow import THREE, TWO, Narrow, assert_same, stage_threads
from tests.engine.runs.small_training import QUIET, metrics_of
from tests.tolerance import DOUBLE

ALL, HEAD = {0: ["backbone", "head"]}, {0: ["head"]}


SMALL = Preprocessing(32, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def classifier(
    split_at: list[str] = TWO, weights: list[float] | None = None, clip: float | None = None, **optimizer: Any
) -> Classifier:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2048, 3))
    network = TransferNetwork(Narrow(split_at), head, SMALL)
    settings = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "schedule": "constant", "warmup_fraction": 0.0}
    loss, training = ClassificationLoss(weights), Training(total_steps=6, gradient_clip=clip)
    return Classifier(network, loss, Optimizer(**settings | optimizer), training, *metrics_of(3))


def data() -> ImageData:
    """Three steps per epoch, of 8, 8 and 4 images."""
    labels = [index % 3 for index in range(26)]
    noise = torch.randint(0, 100, (26, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = noise + 50 * torch.tensor(labels, dtype=torch.uint8)[:, None, None, None]
    splits = {"train": list(range(20)), "val": list(range(20, 26)), "test": []}
    images = LabelledImages(
        ("a", "b", "c"), [str(i) for i in range(26)], labels, splits, lambda i: pixels[i], in_memory=True
    )
    return ImageData(Data(augment="none", batch_size=8, num_workers=0), images, SMALL, seed=0)


def fit(
    model: Classifier, strategy: Any, *callbacks: L.Callback, epochs: int = 1, batchnorm: str = "keep", **settings: Any
) -> L.Trainer:
    """Trains all layers; batchnorm='keep': with statistics that stay, so that an image's result is its own."""
    resume, phases = settings.pop("resume", None), settings.pop("phases", ALL)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if strategy is None else len(model.network.backbone.split_at) + 1,
        strategy=strategy or SingleDeviceStrategy("cpu"),
        max_epochs=epochs,
        callbacks=[FreezingSchedule(FreezePlan(phases, epochs, batchnorm)), *callbacks],
        enable_checkpointing=False,
        **QUIET,
        **settings,
    )
    trainer.fit(model, data(), ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def trained(strategy: Any, *callbacks: L.Callback, **settings: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights and the metrics after an epoch."""
    of_model = {
        name: settings.pop(name) for name in ("weights", "name", "momentum", "split_at", "clip") if name in settings
    }
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


@functools.cache  # all who call it compute in float64
def whole_batches(*weights: float, clip: float | None = None) -> tuple[dict[str, Tensor], dict[str, float]]:
    torch.manual_seed(0)
    return trained(None, weights=list(weights) or None, clip=clip)


@pytest.fixture
def no_dropout(monkeypatch):
    """Whole batches and micro-batches draw in another order on CPUs: compare them without it."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)


@pytest.mark.numbers
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_eight_micro_batches_are_one_batch(float64, no_dropout, schedule):
    """Also of the last batch, which has four images."""
    weights, metrics = trained(build_model_parallel(8, schedule))
    expected, their_metrics = whole_batches()
    assert relative_change(weights, expected) < DOUBLE
    assert metrics == pytest.approx(their_metrics, rel=DOUBLE)


@pytest.mark.numbers
def test_uneven_micro_batches_count_with_the_weights_of_their_classes(float64, no_dropout):
    weights, metrics = trained(build_model_parallel(3, "1f1b"), weights=[0.2, 1.0, 5.0])
    expected, their_metrics = whole_batches(0.2, 1.0, 5.0)
    assert relative_change(weights, expected) < DOUBLE
    assert metrics["train/loss"] == pytest.approx(their_metrics["train/loss"], rel=DOUBLE)


@pytest.mark.numbers
def test_gradients_are_clipped(float64, no_dropout):
    weights, _ = trained(build_model_parallel(4, "1f1b"), clip=0.01)
    assert relative_change(weights, whole_batches(clip=0.01)[0]) < DOUBLE
    assert relative_change(weights, whole_batches()[0]) > 0.3


@pytest.mark.numbers
def test_an_average_of_the_weights_is_kept(float64, no_dropout):
    averages = []
    for strategy in (None, build_model_parallel(4, "1f1b")):
        average = WeightAverage(0.5)
        trained(strategy, average)
        averages.append(average.weights())
    assert relative_change(averages[1], averages[0]) < DOUBLE


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
    with pytest.raises(UserError, match="out of memory in step 1 with 8 images"):
        fit(model, build_model_parallel(4, "1f1b"), OutOfMemory("stop", 200))
    assert not stage_threads()


@pytest.mark.numbers
def test_one_micro_batch_that_does_not_fit_is_repeated_in_parts(float64, no_dropout):
    def fail(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory, it was said")

    model = classifier()
    model.network.backbone.layer3[0].register_forward_pre_hook(fail)
    fit(model, build_model_parallel(1, "1f1b"), OutOfMemory("split", 200))
    assert relative_change(model.network.state_dict(), whole_batches()[0]) < DOUBLE


# Where things are: tensors on the device meta have a shape and no values, and do not mix with those on a CPU.


def placed(strategy: Any, model: Classifier, devices: list[str]) -> None:
    strategy.parallel_devices = [torch.device(device) for device in devices]
    strategy.connect(model)
    strategy.model_to_device()


def test_what_comes_after_the_network_is_on_the_last_device():
    model, strategy = classifier(weights=[1.0, 2.0, 3.0]), build_model_parallel(1, "1f1b")
    placed(strategy, model, ["cpu", "meta"])
    images, labels = strategy.batch_to_device((torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4) % 3))
    logits = model(images)
    loss = model.mean_loss(logits, labels)
    assert (images.device.type, strategy.root_device.type, model.device.type) == ("cpu", "cpu", "cpu")
    after = (labels, loss, logits, model.loss.class_weights, model.loss_weight(labels))
    assert {tensor.device.type for tensor in after} == {"meta"}
    assert {metrics.asking[""].metric.device.type for metrics in (model.train_metrics, model.val_metrics)} == {"meta"}


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
    model.network.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(AssertionError, match=r"network\.scale"):
        placed(build_model_parallel(1, "1f1b"), model, ["cpu", "cpu"])


def test_more_devices_than_stages():
    with pytest.raises(UserError, match="2 stages do not fit 3 devices") as caught:
        placed(build_model_parallel(4, "1f1b"), classifier(), ["cpu"] * 3)
    assert "trainer.devices=2" in caught.value.fix[0]
