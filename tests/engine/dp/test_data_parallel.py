"""strategy=dp on a CPU, which takes the place of several devices: the result of one device, and what replicas see."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from src.callbacks.freezing import FreezingSchedule
from src.config import Data
from src.data.module import ImageData
from src.engine.dp.data_parallel import DataParallel
from src.engine.dp.replication import chunk_sizes, in_threads, on_cpu
from src.engine.runs.errors import UserError
from src.engine.steps.out_of_memory import OutOfMemory
from src.engine.steps.precision import DTYPES, precision_plugin
from src.models.classifier import Classifier
from src.models.losses import ClassificationLoss
from tests.engine.runs.small_training import QUIET, SQUARE, classifier, images, network, plan
from tests.engine.steps import little_memory
from tests.engine.steps.little_memory import MESSAGE, Small, at_most
from tests.tolerance import DOUBLE

CPU = torch.device("cpu")


class Watch(L.Callback):
    """The loss of every step, and of every call of a network: how many images, where, and with which settings."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.calls: list[tuple[bool, int]] = []  # whether it was in the main thread, images
        self.modes: set[tuple[bool, bool, bool, torch.dtype]] = set()  # training, a graph, inference mode, type

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.network.register_forward_hook(self.look)

    def look(self, network: nn.Module, images: tuple[Tensor], logits: Tensor) -> None:
        self.calls.append((threading.current_thread() is threading.main_thread(), len(logits)))
        inference = torch.is_inference_mode_enabled()
        self.modes.add((network.head.training, logits.requires_grad, inference, logits.dtype))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: dict[str, Tensor], *rest: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def data(batch_size: int) -> ImageData:
    """20 images to train on, 10 to validate on."""
    return ImageData(Data(augment="none", batch_size=batch_size, num_workers=0), images(), SQUARE, seed=0)


def train(
    replicas: int | None, batch_size: int = 6, epochs: int = 5, batchnorm: str = "keep", **settings: Any
) -> tuple[Classifier, L.Trainer, Watch]:
    """replicas: of dp; None: a run without it. Adam would turn differences of rounding into steps of full size."""
    model, watch = classifier(epochs, clip=0.5, name="sgd", lr=0.1, momentum=0.9), Watch()
    model.loss = ClassificationLoss([0.2, 1.0, 3.0], label_smoothing=0.1)
    freeze, resume = settings.pop("freeze", {"preset": "full"}), settings.pop("resume", None)
    strategy = "auto" if replicas is None else DataParallel()
    settings = {"accelerator": "cpu", "devices": replicas or 1, "strategy": strategy} | settings
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[FreezingSchedule(plan(epochs, batchnorm=batchnorm, **freeze)), watch],
        enable_checkpointing=False,
        **QUIET,
        **settings,
    )
    trainer.fit(model, data(batch_size), ckpt_path=resume, weights_only=True if resume else None)
    return model, trainer, watch


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max((one.double() - other.double()).abs().max().item() for one, other in pairs)


# The result of one device


@pytest.mark.numbers
@pytest.mark.parametrize("freeze", [{"preset": "full"}, {"preset": "gradual", "last_n": 3}], ids=["full", "gradual"])
@pytest.mark.parametrize("devices", [2, 3])
def test_twenty_steps_are_those_of_one_device(float64, devices, freeze):
    """The last batch of an epoch has 2 images, which devices do not share; the loss weighs classes; blocks that are
    frozen at first begin to learn; gradients are clipped."""
    expected, single, steps = train(None, freeze=freeze)
    found, trainer, watch = train(devices, freeze=freeze)
    assert trainer.global_step == single.global_step == 20
    assert watch.losses == pytest.approx(steps.losses, rel=DOUBLE)
    assert largest_difference(expected, found) < DOUBLE
    assert single.callback_metrics.keys() > {"train/loss", "val/loss", "val/acc"}
    torch.testing.assert_close(trainer.callback_metrics, single.callback_metrics, atol=DOUBLE, rtol=DOUBLE)
    assert {rows for main, rows in watch.calls if main} == {2}


def test_one_device_is_the_same_to_the_bit():
    expected, _, steps = train(None, epochs=2, batchnorm="update")
    found, _, watch = train(1, epochs=2, batchnorm="update")
    assert largest_difference(expected, found) == 0
    assert watch.losses == steps.losses
    assert watch.calls == steps.calls


def test_dropout_is_the_same_in_every_run():
    runs = []
    for _ in range(2):
        runs.append(Small(dropout=0.5))
        little_memory.fit(runs[-1], devices=3, strategy=DataParallel())
    assert largest_difference(*runs) == 0


def test_batchnorm_keeps_the_statistics_of_the_first_device():
    """Each chunk is normalised by itself, and the second one's statistics are lost: not averaged, not counted."""
    model, _, _ = train(2, batch_size=20, epochs=1, batchnorm="update")
    alone = network().train()
    images, _ = next(iter(data(20).train_dataloader()))
    alone(images[:10])
    found, expected = model.network.backbone.stem[1], alone.backbone.stem[1]
    assert found.num_batches_tracked == 1
    assert found.running_mean.equal(expected.running_mean)
    assert found.running_var.equal(expected.running_var)


# What replicas see


def test_chunks_in_training_and_validation():
    """A batch that gives a device a single image has fewer replicas; one or two images need none."""
    _, _, watch = train(2, batch_size=9, epochs=1)
    batches = [[(False, 5), (False, 4)], [(False, 5), (False, 4)], [(True, 2)]]
    validation = [[(False, 5), (False, 4)], [(True, 1)]]
    assert watch.calls == [call for batch in batches + validation for call in batch]


@pytest.mark.parametrize(("rows", "devices"), [(7, 3), (10, 3), (2, 2), (3, 2), (5, 4), (1, 8), (64, 7), (9, 4)])
def test_no_device_gets_a_single_image_of_a_batch_of_more(rows, devices):
    """torch's own chunks of 7 for 3 devices are 3, 3 and 1."""
    sizes = chunk_sizes(rows, devices)
    assert sum(sizes) == rows
    assert len(sizes) <= devices
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(rows, 2)


def test_a_last_batch_of_seven_trains_on_three_devices_with_batchnorm():
    """Images so small that BatchNorm sees one value of a channel for each."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(7, 3, 3, 3)
    assert len(on_cpu(model, images, chunk_sizes(7, 3), nullcontext)) == 7
    with pytest.raises(ValueError, match="more than 1 value"):
        on_cpu(model, images, [3, 3, 1], nullcontext)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_settings_of_the_main_thread(precision):
    """Precision, gradients and inference mode are settings of a thread, and a new one has the defaults."""
    model, trainer, watch = train(2, epochs=1, plugins=[precision_plugin(precision, CPU)])
    trainer.validate(model, data(6), verbose=False)
    dtype = DTYPES.get(precision, torch.float32)
    training, validation = (True, True, False, dtype), (False, False, False, dtype)
    assert watch.modes == {training, validation, (False, False, True, dtype)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_one_device_learns(precision):
    steps, watch = (train(replicas, plugins=[precision_plugin(precision, CPU)])[2] for replicas in (None, 2))
    assert watch.losses == pytest.approx(steps.losses, abs=0.02)


class Tied(nn.Module):
    """A weight that two layers share, a frozen bias, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(self.second(self.first(rows)))


def test_replicas_of_a_cpu():
    module, seen = Tied(), []
    module.second.register_forward_hook(lambda layer, *_: seen.append((layer.weight, layer.bias.requires_grad)))
    module.norm.register_forward_hook(lambda layer, *_: seen.append(layer.running_mean))
    rows = torch.randn(6, 4)
    on_cpu(module, rows, [3, 3], nullcontext).square().sum().backward()
    (first, first_frozen), first_mean, (second, second_frozen), second_mean = seen
    assert first.data_ptr() == module.first.weight.data_ptr() != second.data_ptr(), "a weight that two layers share"
    assert not first_frozen
    assert not second_frozen
    assert first_mean.data_ptr() == module.norm.running_mean.data_ptr() != second_mean.data_ptr()
    assert module.first.weight.grad is not None
    assert module.second.bias.grad is None
    with torch.no_grad():
        assert not on_cpu(module, rows, [3, 3], nullcontext).requires_grad


# What goes wrong in a replica


@pytest.mark.numbers
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_that_does_not_fit_is_repeated_in_parts(float64, where, caplog):
    """Four images fit on a device, eight on two."""
    expected, found, callback = Small(), Small(at_most(4), where), OutOfMemory("split", 10**9)
    reference = little_memory.fit(expected)
    trainer = little_memory.fit(found, callback, devices=2, strategy=DataParallel())
    assert callback.parts.size == 8
    assert "repeated in parts of 8" in caplog.text
    assert largest_difference(expected, found) < DOUBLE
    assert trainer.global_step == reference.global_step
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(
        float(reference.callback_metrics["train/loss"]), DOUBLE
    )


def test_the_message_of_a_lack_of_memory_is_torchs_own():
    with pytest.raises(UserError, match="step 1 with 16 images") as error:
        little_memory.fit(Small(at_most(4), "forward"), OutOfMemory("stop", 1), devices=2, strategy=DataParallel())
    assert MESSAGE in error.value.why
    assert type(error.value.__cause__) is torch.OutOfMemoryError
    assert str(error.value.__cause__) == MESSAGE


class Odd(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first, second)


def test_an_error_is_raised_as_it_is_and_nothing_stays_behind():
    raised, threads = Odd("a", "b"), threading.enumerate()

    class Faulty(Small):
        def forward(self, images: Tensor) -> Tensor:
            raise raised

    model = Faulty()
    with pytest.raises(Odd) as error:
        little_memory.fit(model, devices=2, strategy=DataParallel())
    assert error.value is raised
    assert threading.enumerate() == threads


def test_threads_work_at_the_same_time_and_raise_the_first_error_as_it_is():
    together, raised, threads = threading.Barrier(3, timeout=20), Odd("a", "b"), threading.enumerate()

    def work(fails: bool) -> bool:
        together.wait()
        if fails:
            raise raised
        return fails

    assert in_threads(3, work, [False] * 3) == [False] * 3
    with pytest.raises(Odd) as error:
        in_threads(3, work, [False, True, True])
    assert error.value is raised
    assert threading.enumerate() == threads


# A strategy of Lightning


@pytest.mark.numbers
def test_checkpoints_are_those_of_one_device(float64, tmp_path):
    """Their keys are the same, and a run continues from them under dp to the bit, and on one device."""
    first, trainer, _ = train(2, epochs=4, max_steps=8)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"].keys()
    assert keys == classifier().state_dict().keys() == first.state_dict().keys()
    whole, _, _ = train(2, epochs=4)
    for devices, limit in ((2, 0.0), (None, DOUBLE)):
        continued, trainer, _ = train(devices, epochs=4, resume=tmp_path / "last.ckpt")
        assert trainer.global_step == 16
        assert largest_difference(whole, continued) <= limit


def test_one_process_whatever_the_environment_says(monkeypatch):
    environment = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=DataParallel(), logger=False)
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank) == (1, 0, 0)
    assert trainer.is_global_zero
    assert trainer.distributed_sampler_kwargs is None
    assert trainer.strategy.parallel_devices == [CPU, CPU]


def test_the_first_device_of_a_list_is_the_one_that_holds_the_network():
    strategy = DataParallel()
    strategy.parallel_devices = [torch.device("cuda", 3), torch.device("cuda", 1)]
    assert strategy.root_device == torch.device("cuda", 3)
