"""A run that runs out of memory ends as one that does not; what cannot be repeated is said."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from src.callbacks.freezing import FreezingSchedule
from src.config import Optimizer
from src.engine.runs.errors import ExitCode, UserError
from src.engine.steps.engine_module import Training
from src.engine.steps.out_of_memory import OutOfMemory
from src.engine.weights.preprocessing import Preprocessing
from src.models.classifier import Classifier
from src.models.freezing import FreezePlan
from src.models.losses import ClassificationLoss
from src.models.network import Architecture, build_network
from tests.engine.runs.small_training import metrics_of
from tests.engine.steps.little_memory import BATCHES, MESSAGE, FailInBackward, Small, at_most, fit, noise
from tests.tolerance import DOUBLE

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """The libraries' own objects, a million of them, are not searched for garbage after every failure."""
    gc.freeze()
    yield
    gc.unfreeze()


def split(grow_after: int = 10**9) -> OutOfMemory:
    return OutOfMemory("split", grow_after)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    return (weights(first) - weights(second)).abs().max().item()


def sizes_in(model: Small, batch: int) -> list[int]:
    """The images of the attempts at a batch."""
    return [images for number, images in model.attempts if number == batch]


# The same result


@pytest.mark.numbers
@pytest.mark.parametrize(("limit", "size"), [(9, 8), (4, 4), (1, 1)])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("weights", [None, [0.1, 1.0, 2.0, 5.0]])
def test_the_result_is_that_of_a_run_that_fits(float64, where, limit, size, weights):
    """Also of a loss with class weights, which is no plain mean."""
    expected = Small(class_weights=weights)
    found, callback = Small(at_most(limit), where, class_weights=weights), split()
    reference, trainer = fit(expected), fit(found, callback)
    assert callback.parts.size == size
    assert largest_difference(expected, found) < DOUBLE
    assert trainer.global_step == reference.global_step
    assert trainer.callback_metrics.keys() == reference.callback_metrics.keys()
    assert {"train/loss", "train/acc"} < trainer.callback_metrics.keys()
    for name, value in reference.callback_metrics.items():
        assert trainer.callback_metrics[name].item() == pytest.approx(value.item(), abs=DOUBLE), name
    assert len(found.outputs) == len(expected.outputs) == 3 * len(BATCHES)
    for ours, theirs in zip(found.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=DOUBLE, rtol=0)
        assert not ours["loss"].requires_grad, "the graph of a part is kept"


def test_parts_are_as_alike_as_possible_and_stay_small():
    model = Small(at_most(5))
    fit(model, split(), max_epochs=1)
    assert sizes_in(model, 0) == [16, 8, 4, 4, 4, 4]
    assert sizes_in(model, 1) == [4, 4, 4, 4]
    assert sizes_in(model, 3) == [3, 3]


@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_run_that_fits_is_the_same_to_the_bit(batchnorm):
    runs = []
    for callbacks in ((), (split(),), (OutOfMemory("stop", 200),)):
        model = Small(batchnorm=batchnorm, dropout=0.5)
        trainer = fit(model, *callbacks)
        runs.append((weights(model), trainer.callback_metrics, model.outputs))
    for found in runs[1:]:
        torch.testing.assert_close(found, runs[0], atol=0, rtol=0)


class PartsFrom(L.Callback):
    """Has the parts that a run needs from some batch on, before it fails there."""

    def __init__(self, callback: OutOfMemory, batch: int, size: int) -> None:
        self.callback, self.batch, self.size = callback, batch, size

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.batch:
            self.callback.parts.size = self.size


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("batch", [0, 1])
def test_a_failed_attempt_leaves_no_trace(where, batch):
    """Random states, gradients and BatchNorm's statistics are as if it had not been made."""
    shared = {"batchnorm": True, "dropout": 0.5}
    failing = Small(lambda images, now: images <= 4 or now < batch, where, **shared)
    fit(failing, split())
    foreseeing, callback = Small(**shared), split()
    fit(foreseeing, PartsFrom(callback, batch, 4), callback)
    assert sizes_in(failing, batch) == [16, 8, *sizes_in(foreseeing, batch)] == [16, 8, 4, 4, 4, 4]
    assert weights(failing).equal(weights(foreseeing))


def test_batchnorm_that_is_trained_from_a_later_epoch_on_is_restored_too():
    class Unfreezing(Small):
        def on_train_epoch_start(self) -> None:
            self.norm.train(self.current_epoch > 0)

    failing = Unfreezing(lambda images, batch: images <= 8 or batch < 5)
    fit(failing, split())
    foreseeing, callback = Unfreezing(), split()
    fit(foreseeing, PartsFrom(callback, 5, 8), callback)
    assert weights(failing).equal(weights(foreseeing))


def test_what_a_failed_attempt_held_is_freed_before_the_next():
    alive: list[int] = []

    class Watching(Small):
        def forward(self, images: Tensor) -> Tensor:
            alive.append(sum(activation() is not None for activation in self.activations))
            self.activations.clear()
            if not self.fits(len(images), 0):
                ring: list[Any] = [images * 2]
                ring.append(ring)  # as traces of errors and caches of libraries do: it refers to itself
                self.activations.append(weakref.ref(ring[0]))
            return super().forward(images)

    gc.disable()  # nothing but what the callback does may free it
    try:
        for where in ("forward", "backward"):
            fit(Watching(at_most(4), where), split(), max_epochs=1)
    finally:
        gc.enable()
    assert alive
    assert not any(alive)


class Plain(Small):
    """Adam would turn the rounding of half precision into steps of full size."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.groups(), lr=0.1)


def test_the_scaler_of_fp16_and_clipping():
    runs = []
    for limit in (16, 4):
        model = Plain(at_most(limit), clip=0.1)
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5))
        trainer = fit(model, split(), plugins=[precision])
        runs.append((model, precision.scaler.state_dict(), trainer.global_step))
    assert runs[0][1:] == runs[1][1:]
    assert runs[0][1]["scale"] == 256, "the scaler did nothing"
    assert largest_difference(runs[0][0], runs[1][0]) < 5e-5


# The project's own module


@pytest.mark.numbers
@pytest.mark.parametrize("class_weights", [None, [0.1, 1.0, 2.0, 5.0]])
def test_the_classifier_of_the_project(float64, class_weights):
    """Its metrics see every batch once, and a class-weighted loss is that of the whole batch."""
    runs = []
    for limit in (16, 5):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        network = build_network(Architecture("resnet18", "linear", 4), Preprocessing(32, 1.0, "bilinear", HALF, HALF))
        network.backbone.register_forward_hook(fails_beyond(limit))
        loss = ClassificationLoss(class_weights, label_smoothing=0.1)
        optimizer = Optimizer(name="sgd", lr=1e-3, momentum=0.9)
        model = Classifier(network, loss, optimizer, Training(total_steps=3), *metrics_of(4))
        freezing = FreezingSchedule(FreezePlan({0: ["backbone.layer4", "head"]}, 1, "keep"))
        images, labels = noise(32).tensors
        data = TensorDataset((images * 40 + 128).clamp(0, 255).byte(), labels)
        callback = split()
        few = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1}
        trainer = fit(model, freezing, callback, data=data, validate=True, **few)
        runs.append((model.state_dict(), trainer.callback_metrics, trainer.global_step))
    assert callback.parts.size == 4
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} < runs[0][1].keys()
    torch.testing.assert_close(runs[1], runs[0], atol=DOUBLE, rtol=DOUBLE)


def fails_beyond(limit: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook: out of memory in the backward pass of more images than that."""

    def hook(module: nn.Module, inputs: Any, features: Tensor) -> Tensor:
        return FailInBackward.apply(features) if len(features) > limit and torch.is_grad_enabled() else features

    return hook


# What is said, and when it ends


def test_one_line_per_change(caplog):
    fit(Small(at_most(5)), split(), max_epochs=1)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("src.")]
    assert lines == [
        "out of memory in the backward pass of step 1 with parts of 16 images: repeated in parts of 8",
        "out of memory in the backward pass of step 1 with parts of 8 images: repeated in parts of 4",
    ]


def test_batchnorm_in_training_mode_is_mentioned_once(caplog):
    fit(Small(at_most(5), batchnorm=True), split())
    fit(Small(batchnorm=True), split())
    assert caplog.text.count("BatchNorm") == 1
    assert "freeze.batchnorm=keep" in caplog.text


def test_larger_parts_are_tried_after_clean_steps_and_less_and_less_often(caplog):
    caplog.set_level(logging.INFO)
    model = Small(lambda images, batch: images <= 5 or batch >= 10)
    callback = split(grow_after=2)
    fit(model, callback, max_epochs=6)
    largest = [max(sizes_in(model, batch)) for batch in range(20)]
    # 4 fits; 8 is tried in vain in batch 2, and after 4 more in 6 (the last batches of an epoch have 6 images); from
    # batch 10 on everything fits, so that 8 is kept in 14 and whole batches are tried 8 steps later.
    assert [(batch, size) for batch, size in enumerate(largest[:15]) if size > 4] == [(0, 16), (2, 8), (6, 8), (14, 8)]
    assert callback.parts.size is None
    assert max(sizes_in(model, 22)) == 16
    assert "trying parts of 8 images" in caplog.text
    assert "trying whole batches" in caplog.text


def test_a_run_that_continues_has_the_parts_it_had(tmp_path):
    whole, callback = Small(at_most(5)), split(grow_after=50)
    fit(whole, callback)
    first = Small(at_most(5))
    fit(first, split(grow_after=50), max_epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    second, continued = Small(at_most(5)), split(grow_after=50)
    trainer = fit(second, continued, resume=tmp_path / "last.ckpt")
    assert trainer.global_step == 3 * len(BATCHES)
    assert {images for _, images in second.attempts} == {3, 4}
    assert continued.parts == callback.parts
    assert weights(second).equal(weights(whole))


def test_the_steps_are_counted_on_when_the_same_trainer_fits_again():
    model = Small()
    trainer = fit(model, split(), max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, DataLoader(noise(), batch_size=16))
    assert trainer.global_step == 2 * len(BATCHES)


def test_policy_stop_says_what_to_do():
    model = Small(at_most(5))
    with pytest.raises(UserError) as error:
        fit(model, OutOfMemory("stop", 200))
    assert error.value.code == ExitCode.OUT_OF_MEMORY
    text = error.value.render()
    for part in ("step 1 with 16 images", "oom.policy=split", "data.batch_size=8", "Tried to allocate 2.00 GiB"):
        assert part in text
    assert len(model.attempts) == 1


def test_a_image_that_does_not_fit_ends_the_run():
    model = Small(at_most(0))
    with pytest.raises(UserError, match="a single image") as error:
        fit(model, split())
    assert error.value.code == ExitCode.OUT_OF_MEMORY
    assert "data.image_size=" in error.value.render()
    assert [images for _, images in model.attempts] == [16, 8, 4, 2, 1]


class FailsInStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        raise torch.OutOfMemoryError(MESSAGE)


def test_the_optimizers_step_is_not_repeated():
    class Heavy(Small):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return FailsInStep(self.groups(), lr=0.1)

    model = Heavy()
    with pytest.raises(UserError, match="in the optimizer, in step 1") as error:
        fit(model, split())
    assert error.value.code == ExitCode.OUT_OF_MEMORY
    assert "optimizer=sgd" in error.value.render()
    assert len(model.attempts) == 1


@pytest.mark.parametrize("policy", ["split", "stop"])
@pytest.mark.parametrize("message", ["CUDA error: device-side assert triggered\nCompile with", "shapes do not match"])
def test_other_errors_are_not_repeated(policy, message):
    calls: list[int] = []

    class Faulty(Small):
        def forward(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message.splitlines()[0]):
        fit(Faulty(), OutOfMemory(policy, 200))
    assert calls == [16]
