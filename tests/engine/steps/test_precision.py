"""Precisions: fp16 with loss scaling, on a CPU too, and where a precision is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor

from src.engine.runs.errors import ExitCode, UserError
from src.engine.steps import precision
from src.engine.steps.precision import check_precision, precision_plugin, usable_precision
from src.models.classifier import Classifier
from tests.conftest import parses
from tests.engine.runs.small_training import classifier, fit, freezing

CPU = torch.device("cpu")


class Steps(L.Callback):
    """What every step leaves: the loss, the scale, the head's weights, and the lr that the next one has."""

    def __init__(self, plugin: Precision, overflow_in: int | None = None) -> None:
        self.plugin, self.overflow_in = plugin, overflow_in
        self.losses: list[float] = []
        self.scales: list[float] = []
        self.weights: list[Tensor] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        def overflow(gradient: Tensor) -> Tensor:
            return gradient * torch.inf if trainer.global_step == self.overflow_in else gradient

        pl_module.network.head.weight.register_hook(overflow)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Classifier, outputs: dict[str, Tensor], *rest: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.scales.append(self.plugin.scaler.get_scale())
        self.weights.append(module.network.head.weight.detach().clone())
        self.rates.append(module.lr_schedulers().get_last_lr()[-1])


def train(overflow_in: int | None = None, **settings: Any) -> tuple[Classifier, L.Trainer, Steps]:
    """16 steps in fp16, with a scale that doubles after eight good ones. overflow_in: the step whose gradients are inf."""
    plugin = precision_plugin("fp16", CPU)
    plugin.scaler.set_growth_interval(8)
    steps, model = Steps(plugin, overflow_in), classifier(4, name="sgd", lr=0.1)
    return model, fit(model, 4, freezing(preset="full"), steps, plugins=[plugin], **settings), steps


def test_fp16_trains_on_a_cpu():
    model, trainer, steps = train()
    assert trainer.precision == "16-mixed"
    assert steps.scales == [65536.0] * 7 + [131072.0] * 8 + [262144.0]
    assert torch.tensor(steps.losses).isfinite().all()
    assert sum(steps.losses[-4:]) < sum(steps.losses[:4])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_what_lightning_is_given(name, dtype):
    """In place of the Trainer's precision="16-mixed", which would become bf16 on a CPU."""
    plugin = precision_plugin(name, CPU)
    trainer = L.Trainer(accelerator="cpu", devices=1, plugins=[plugin], logger=False)
    assert trainer.precision_plugin is plugin
    assert type(plugin) is (MixedPrecision if dtype else Precision)
    assert (getattr(plugin, "scaler", None) is not None) == (name == "fp16")
    with plugin.forward_context():
        assert torch.is_autocast_enabled("cpu") == (dtype is not None)
        assert dtype is None or torch.get_autocast_dtype("cpu") == dtype
    if name != "fp32":
        assert precision_plugin(name, torch.device("cuda", 1)).device == "cuda"


@pytest.mark.parametrize(("step", "scale"), [(0, 32768), (9, 65536)])
def test_a_step_whose_gradients_overflow_is_passed_over(step, scale):
    """It moves no weight and halves the scale, but is counted, and the schedule goes on as planned."""
    _, _, planned = train()
    _, trainer, steps = train(overflow_in=step)
    before = classifier().network.head.weight if step == 0 else steps.weights[step - 1]
    assert steps.weights[step].equal(before)
    assert not steps.weights[step + 1].equal(steps.weights[step])
    assert steps.scales[step] == scale
    assert trainer.global_step == 16
    assert steps.rates == planned.rates
    assert torch.tensor(steps.losses).isfinite().all()


def test_a_run_that_continues_has_the_scale_it_had(tmp_path):
    _, _, steps = train()
    train(max_steps=4)[1].save_checkpoint(tmp_path / "last.ckpt")
    _, _, rest = train(resume=tmp_path / "last.ckpt")
    assert rest.scales == steps.scales[4:]
    assert rest.weights[-1].equal(steps.weights[-1])


# Where a precision is refused


def test_fp16_on_a_cpu_is_a_warning(caplog):
    check_precision("fp16", CPU)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "15 times as long" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [("bf16", "cpu", "AVX512-BF16"), ("fp16", "mps", "loss scaling"), ("bf16", "cuda", "Tesla T4")],
)
def test_what_a_device_does_not_have_is_refused(monkeypatch, name, device, reason):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match=f"precision={name} does not work on {device}") as error:
        check_precision(name, torch.device(device))
    assert error.value.code == ExitCode.UNAVAILABLE
    assert reason in error.value.why
    assert parses([error.value.fix[0].split()[-1]])
    assert usable_precision(name, torch.device(device)) == "fp32"


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_bf16_that_onednn_may_not_use_is_refused_too(monkeypatch, name):
    monkeypatch.setattr(Path, "read_text", lambda *words, **settings: "flags : avx512f avx512_bf16 amx_bf16")
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    assert precision.cpu_has_bf16()
    monkeypatch.setenv(name, "avx512_core_bf16")
    assert precision.cpu_has_bf16()
    monkeypatch.setenv(name, "avx2")
    with pytest.raises(UserError, match="precision=bf16 does not work on cpu") as error:
        check_precision("bf16", CPU)
    assert "ONEDNN_MAX_CPU_ISA=AVX2 rules out" in error.value.why


def test_a_refusal_keeps_the_other_words(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    monkeypatch.setenv("TRAIN_COMMAND", "python -m src.train 'data.root=my photos' precision=bf16 seed=3")
    with pytest.raises(UserError) as error:
        check_precision("bf16", CPU)
    assert error.value.fix == ["python -m src.train 'data.root=my photos' precision=fp32 seed=3"]


def test_what_is_not_refused(monkeypatch, caplog):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for name, device in (("fp32", "cpu"), ("bf16", "cpu"), ("fp16", "cuda"), ("bf16", "cuda"), ("bf16", "mps")):
        check_precision(name, torch.device(device))
        assert usable_precision(name, torch.device(device)) == name
    assert not caplog.records


def test_a_model_of_fp16_predicts_in_fp32_on_a_cpu(caplog):
    assert usable_precision("fp16", CPU) == "fp32"
    assert not caplog.records


def test_predict_does_not_wait_for_lightning():
    code = "import sys, src.engine.steps.precision; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
