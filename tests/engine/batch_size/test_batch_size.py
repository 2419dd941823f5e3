"""data.batch_size=auto: the largest batch that fits is found, and nothing else is different afterwards."""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src import task as task_module
from src.config import Config, Optimizer, Precision, Trainer
from src.engine.batch_size import batch_size
from src.engine.batch_size.batch_size import find_batch_size, memory_of
from src.engine.batch_size.batch_size_search import Measured, chosen_batch_size
from src.engine.images.labelled_images import LabelledImages
from src.engine.memory import ram
from src.engine.memory.memory import MIB
from src.engine.processes.ranks import Ranks
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.job import Job
from src.engine.weights.preprocessing import Preprocessing
from src.models.freezing import FreezePlan
from src.models.losses import ClassificationLoss
from src.models.network import TransferNetwork
from src.task import Task
from src.tasks.multiclass import Multiclass
from tests.conftest import parses
from tests.engine.runs.test_model_folder import CARD

CPU = torch.device("cpu")
PHASES = {0: ["head"], 1: ["backbone.layer4"], 2: ["backbone"]}


class Steady:
    """A device of which every step takes 100 MiB."""

    name = "a device"

    def __init__(self, mib: int = 1000) -> None:
        self.mib, self.resets = mib, 0

    def usable(self) -> int:
        return self.mib * MIB

    def reset_peak(self) -> None:
        self.resets += 1

    def held(self) -> int:
        return 50 * MIB

    def peak(self) -> int:
        return 100 * MIB


SMALL = Preprocessing(32, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def network() -> TransferNetwork:
    """A few small layers with the names of a ResNet's."""
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(3, 4, 3, stride=4),
        "bn1": nn.BatchNorm2d(4),
        "layer4": nn.Conv2d(4, 4, 3),
        "dropout": nn.Dropout(),
        "pool": nn.AdaptiveAvgPool2d(1),
    }
    return TransferNetwork(nn.Sequential(OrderedDict(layers)), nn.Linear(4, 3), SMALL)


@pytest.fixture
def freed(monkeypatch) -> list[None]:
    """Grows when memory is given back, which is not done here: it takes most of a second among all that pytest loads."""
    calls: list[None] = []
    monkeypatch.setattr(batch_size, "free", lambda: calls.append(None))
    return calls


@pytest.fixture
def find(network, freed, tmp_path, monkeypatch):
    """find(...) -> the batch size for `network`, or for the one given, with one timed step per size."""
    monkeypatch.setattr(batch_size, "TIMED_STEPS", 1)

    def run(memory=None, *, of=network, loss=None, precision="fp32", epochs=3, images=10**6, devices=1) -> int:
        monkeypatch.setattr(batch_size, "memory_of", lambda device: memory or Steady())
        if loss is not None:
            monkeypatch.setattr(Multiclass, "loss", lambda *_: loss)
        config = Config(
            optimizer=Optimizer(name="adamw", lr=0.002),
            precision=Precision(name=precision),
            trainer=Trainer(max_epochs=epochs, devices=devices),
        )
        labels = LabelledImages(("a", "b", "c"), [], [0] * images, {"train": range(images)}, read=None)
        job = Job(config, SimpleNamespace(path=tmp_path), Ranks(), (CPU,) * devices)
        return find_batch_size(
            job,
            Task(labels, Multiclass(), replace(CARD, preprocessing=SMALL), of, FreezePlan(PHASES, epochs), origin=""),
        )

    return run


def out_of_memory_above(network: TransferNetwork, limit: int, look=lambda module: None) -> list[int]:
    """Lets the network's forward pass fail as a GPU's would, also in copies; returns the sizes that ran."""
    ran: list[int] = []

    def hook(module, inputs) -> None:
        look(module)
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        ran.append(len(inputs[0]))

    network.backbone.register_forward_pre_hook(hook)
    return ran


def test_the_largest_is_found_remembered_and_explained(network, find, freed, tmp_path, caplog):
    caplog.set_level("INFO")
    memory = Steady()
    ran = out_of_memory_above(network, 37)
    assert chosen_batch_size(tmp_path) is None
    assert find(memory) == 32
    assert chosen_batch_size(tmp_path) == 32
    kept = json.loads((tmp_path / "batch_size.json").read_text())
    assert kept["batch_size"] == 32
    assert [(row["batch_size"], row["fits"]) for row in kept["tried"]] == [
        *((size, True) for size in (2, 4, 8, 16, 32)),
        *((size, False) for size in (64, 48, 40)),
    ]
    assert set(ran) == {2, 4, 8, 16, 32}
    assert memory.resets == 1 + len(kept["tried"]) + 1  # to set up the libraries, for each size, for the run's own peak
    assert len(freed) == 1 + len(kept["tried"])
    assert "data.batch_size=auto: 32 (the largest that fits in 90 % of 1000 MiB)" in caplog.messages
    assert any("optimizer.lr=0.002 stays as it is" in message for message in caplog.messages)


def test_nothing_is_different_afterwards(network, find):
    """Weights, buffers, modes, gradients, random state; and the copies are gone, those that ran out of memory too."""
    network.backbone.conv1.requires_grad_(False).eval()
    network.head.eval()
    out_of_memory_above(network, 3)
    weights = copy.deepcopy(network.state_dict())
    flags = [parameter.requires_grad for parameter in network.parameters()]
    modes = [module.training for module in network.modules()]
    random_state = torch.get_rng_state()
    networks = count_networks()
    find()
    assert weights.keys() == network.state_dict().keys()
    assert all(value.equal(weights[name]) for name, value in network.state_dict().items())
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.get_rng_state().equal(random_state)
    assert count_networks() == networks


def count_networks() -> int:
    """How many there are in memory; other tests may have left some."""
    gc.collect()
    return sum(type(found) is TransferNetwork for found in gc.get_objects())


@pytest.mark.parametrize(("epochs", "learns"), [(3, 1.0), (2, 0.5), (1, 0.0)])
def test_steps_are_those_of_the_heaviest_phase_that_the_run_reaches(network, find, epochs, learns):
    seen = set()

    def look(backbone) -> None:
        parts = [next(part.parameters()).requires_grad for part in (backbone.conv1, backbone.layer4)]
        assert parts == [backbone.conv1.training, backbone.layer4.training]
        seen.add(sum(parts) / 2)

    out_of_memory_above(network, 4, look)
    find(epochs=epochs)
    assert seen == {learns}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_are_real(network, find, monkeypatch, precision):
    """Precision, optimizer states and the gradients of the step before are as in a run; no step is passed over."""
    steps, states, dtypes, with_gradients, gradients = [], [], [], [], []
    optimizers, build = [], task_module.build_optimizer
    monkeypatch.setattr(
        task_module, "build_optimizer", lambda *given: optimizers.append(build(*given)) or optimizers[-1]
    )

    class Watched(Steady):
        def held(self) -> int:
            states.append(len(optimizers[-1].state))
            return super().held()

        def peak(self) -> int:
            steps.append({int(state["step"]) for state in optimizers[-1].state.values()})
            gradients.append(optimizers[-1].param_groups[-1]["params"][0].grad.unique().tolist())  # of the head's bias
            return super().peak()

    def look(backbone) -> None:
        dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        with_gradients.append(all(parameter.grad is not None for parameter in backbone.parameters()))

    class Steep(ClassificationLoss):
        """Its gradients overflow in 16 bits if they are scaled by 65536."""

        def forward(self, logits, labels):
            assert self.training
            return logits.float().sum()

    out_of_memory_above(network, 2, look)
    find(Watched(), precision=precision, loss=Steep(), images=20)
    assert steps == [{3}, {3}]  # for the states, to warm up, to be timed
    assert set(states) == {len(list(network.parameters()))}
    assert set(dtypes) == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert set(with_gradients) == {True}  # of the step before, as in Lightning's loop
    assert gradients == [[2.0], [2.0]]  # of one step of two images


@pytest.mark.parametrize(
    ("seconds", "speed"),
    [([0.5, 0.25, 0.125, 0.0625], 2 / 0.125), ([1.5, 0.75], 2 / 0.75), ([5.0], 2 / 5.0)],
    ids=["median of three", "as many as fit in two seconds", "slow"],
)
def test_speed_is_measured_after_a_first_step_and_not_for_long(find, monkeypatch, tmp_path, seconds, speed):
    monkeypatch.setattr(batch_size, "TIMED_STEPS", 3)
    readings = [
        reading for duration in seconds * 2 for reading in (0.0, duration)
    ]  # a first size sets up the libraries
    monkeypatch.setattr(batch_size.time, "perf_counter", iter(readings).__next__)
    find(images=20)
    assert json.loads((tmp_path / "batch_size.json").read_text())["tried"][0]["images_per_second"] == speed


@pytest.mark.parametrize("growing", [False, True])
def test_it_is_said_when_a_smaller_batch_is_as_fast(find, monkeypatch, caplog, growing):
    caplog.set_level("INFO")
    monkeypatch.setattr(
        batch_size, "measure_steps", lambda *given: Measured(1, 1, 100.0 * given[-1] if growing else 100.0)
    )
    assert find(images=80) == 8
    assert ("2 images at a time are about as fast" in caplog.messages) == (not growing)


@pytest.mark.parametrize(("images", "devices", "expected"), [(109, 1, 8), (240, 1, 24), (7, 1, 2), (100, 2, 10)])
def test_an_epoch_keeps_ten_steps(find, caplog, images, devices, expected):
    caplog.set_level("INFO")
    assert find(images=images, devices=devices) == expected
    assert f"a tenth of {images} training images" in caplog.text
    assert ("5 on each device" in caplog.text) == (devices == 2)


@pytest.mark.parametrize("reason", ["out of memory", "too large"])
def test_not_even_one(network, find, tmp_path, reason):
    memory = Steady(1000 if reason == "out of memory" else 60)
    if reason == "out of memory":
        out_of_memory_above(network, 0)
    with pytest.raises(UserError, match="not even one image fits") as error:
        find(memory)
    assert error.value.code == ExitCode.OUT_OF_MEMORY
    text = error.value.render()
    assert len(text.splitlines()) <= 15
    assert ("runs out of memory" if reason == "out of memory" else "needs about 75 MiB") in text
    assert f"a device: {memory.mib} MiB are not used by other programs" in text
    assert all(parses(command.split()[3:]) for command in error.value.fix)
    assert chosen_batch_size(tmp_path) is None


def test_other_errors_are_not_taken_for_a_lack_of_memory(network, find):
    def fail(module, inputs) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    network.backbone.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1"):
        find()


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_real_steps_on_a_cpu(find, tmp_path):
    """Peaks grow with the batch, the chosen one's is below the limit, and a size that would be beyond it is not run."""
    wide = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.MaxPool2d(32))  # much memory, little to compute
    network = TransferNetwork(nn.Sequential(wide, nn.Flatten()), nn.Linear(64, 3), SMALL)
    memory = memory_of(CPU)
    usable = memory.held() + 400 * MIB
    memory.usable = lambda: usable
    size = find(memory, of=network, images=5000)
    tried = json.loads((tmp_path / "batch_size.json").read_text())["tried"]
    ran = {row["batch_size"]: row["peak_mib"] for row in tried if row["images_per_second"]}
    assert ran[size] * MIB <= 0.9 * usable
    assert ran[size] > ran[2]
    assert max(ran.values()) * MIB < usable
    assert not all(row["fits"] for row in tried)


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_where_memory_cannot_be_measured(monkeypatch, device):
    def refuse() -> None:
        raise PermissionError

    monkeypatch.setattr(ram, "reset_resident_peak", refuse)
    with pytest.raises(UserError, match="needs to measure memory") as error:
        memory_of(torch.device(device))
    assert "data.batch_size=32" in error.value.render()
