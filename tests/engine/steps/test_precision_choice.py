"""precision=auto measures, and a run keeps what it has chosen."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from src.engine.runs.errors import UserError
from src.engine.steps import precision_choice
from src.engine.steps.precision_choice import bf16_share, choose_precision
from src.engine.weights.preprocessing import Preprocessing
from src.models.network import Architecture, TransferNetwork, build_network
from tests.conftest import SMALL, check_error
from tests.running import result

CPU = torch.device("cpu")


def network() -> TransferNetwork:
    return build_network(
        Architecture("squeezenet1_1", "linear", 3), Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    )


@pytest.mark.parametrize(("share", "chosen"), [(0.5, "bf16"), (0.79, "bf16"), (0.9, "fp32"), (15.0, "fp32")])
def test_bf16_is_taken_where_it_is_quicker(tmp_path, monkeypatch, share, chosen):
    monkeypatch.setattr(precision_choice, "check_precision", lambda *_: None)
    monkeypatch.setattr(precision_choice, "seconds_of_a_step", lambda name, *_: {"bf16": share, "fp32": 1.0}[name])
    assert choose_precision(tmp_path, network(), 32, CPU) == chosen
    monkeypatch.setattr(precision_choice, "bf16_share", lambda *_: pytest.fail("it is measured again"))
    assert choose_precision(tmp_path, network(), 32, CPU) == chosen


def test_it_is_not_measured_where_it_would_be_emulated(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(precision_choice, "bf16_share", lambda *_: pytest.fail("it is measured"))
    assert choose_precision(tmp_path, network(), 32, CPU) == "fp32"


def test_the_runs_own_network_is_timed_and_left_as_it_was():
    """Other layers would not do: a CPU may be quick with convolutions in bf16, and slow with those of each channel."""
    measured = network().eval().requires_grad_(False)
    before, numbers, modes = copy.deepcopy(measured.state_dict()), torch.random.get_rng_state(), []
    measured.backbone.features[0].register_forward_hook(
        lambda layer, images, _: modes.append((layer.training, *images[0].shape))
    )
    assert 0 < bf16_share(measured, 48, CPU) < 1000
    assert modes == [(True, 8, 3, 48, 48)] * 8
    assert not measured.training
    assert all(weight.grad is None and not weight.requires_grad for weight in measured.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in measured.state_dict().items())
    assert torch.random.get_rng_state().equal(numbers)


def test_fewer_images_are_timed_where_memory_is_short(monkeypatch):
    sizes = []

    def seconds(name, _, images):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return {"bf16": 1.0, "fp32": 2.0}[name]

    monkeypatch.setattr(precision_choice, "seconds_of_a_step", seconds)
    assert bf16_share(network(), 32, CPU) == 0.5
    assert sizes == [8, 4, 2, 2]


def test_a_choice_that_is_damaged_is_not_made_anew(tmp_path):
    (tmp_path / "precision.json").write_text('{"name": "fp8"}')
    with pytest.raises(UserError, match="fp8 is not a precision"):
        choose_precision(tmp_path, network(), 32, CPU)


def test_a_run_chooses_once(command, tmp_path):
    words = (*SMALL, "precision=auto", "trainer.max_epochs=1", "name=one")
    done = command("train", *words)
    assert done.code == 0, done.text
    chosen = json.loads((tmp_path / "runs/one/precision.json").read_text())["name"]
    assert f"precision=auto: {chosen} (" in done.out
    assert f", {chosen}" in next(line for line in done.out.splitlines() if line.startswith("training "))
    assert result(tmp_path / "runs/one")["precision"] == chosen
    assert json.loads((tmp_path / "runs/one/model/model.json").read_text())["precision"] == chosen
    assert command("evaluate", "run=runs/one").code == 0
    check_error(command("train", *SMALL, "precision=fp32", "trainer.max_epochs=1", "name=one"), 64, "precision")
