"""precision=auto measures, and a run keeps what it has chosen."""

from __future__ import annotations

import json

import pytest
import torch

from src.engine.runs.errors import UserError
from src.engine.steps import precision_choice
from src.engine.steps.precision_choice import choose_precision, seconds_of_a_step
from tests.conftest import SMALL, check_error
from tests.running import result

CPU = torch.device("cpu")


@pytest.mark.parametrize(("share", "chosen"), [(0.5, "bf16"), (0.79, "bf16"), (0.9, "fp32"), (15.0, "fp32")])
def test_bf16_is_taken_where_it_is_quicker(tmp_path, monkeypatch, share, chosen):
    monkeypatch.setattr(precision_choice, "check_precision", lambda *_: None)
    monkeypatch.setattr(precision_choice, "seconds_of_a_step", lambda name, _: {"bf16": share, "fp32": 1.0}[name])
    assert choose_precision(tmp_path, CPU) == chosen
    monkeypatch.setattr(precision_choice, "seconds_of_a_step", lambda *_: pytest.fail("it is measured again"))
    assert choose_precision(tmp_path, CPU) == chosen


def test_it_is_not_measured_where_it_would_be_emulated(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(precision_choice, "seconds_of_a_step", lambda *_: pytest.fail("it is measured"))
    assert choose_precision(tmp_path, CPU) == "fp32"


def test_a_step_is_timed_and_draws_no_number():
    before = torch.random.get_rng_state()
    assert 0 < seconds_of_a_step("fp32", CPU) < 10
    assert torch.random.get_rng_state().equal(before)


def test_a_choice_that_is_damaged_is_not_made_anew(tmp_path):
    (tmp_path / "precision.json").write_text('{"name": "fp8"}')
    with pytest.raises(UserError, match="fp8 is not a precision"):
        choose_precision(tmp_path, CPU)


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
