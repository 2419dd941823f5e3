"""Real shortages of a GPU's memory, made by allowing this process only a part of it: pytest -m gpu."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from src.engine.memory.out_of_memory import InParts, free, memory_state
from src.engine.runs.errors import ExitCode
from src.engine.steps.out_of_memory import SNAPSHOT, OutOfMemory
from tests.conftest import command_environment
from tests.engine.steps.little_memory import Small, fit, noise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def allow():
    """allow(share): of what was reserved at the most since the last call of free, only that share may be from here on."""
    free()
    torch.cuda.reset_peak_memory_stats()

    def limit(share: float) -> None:
        most = torch.cuda.max_memory_reserved()
        free()
        torch.cuda.set_per_process_memory_fraction(share * most / torch.cuda.mem_get_info()[1])

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


class Plain(Small):
    """Adam would turn differences of rounding into steps of full size."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.groups(), lr=0.1)


def train(folder: Path, callback: OutOfMemory) -> dict[str, torch.Tensor]:
    model = Plain()
    data = noise(256)  # a convolution of 16 of them makes 33 MiB
    fit(model, callback, data=data, accelerator="gpu", devices=1, max_epochs=1, default_root_dir=folder)
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("history", [False, True])
def test_training_goes_on_in_parts(tmp_path: Path, allow: Callable[[float], None], caplog, history):
    expected = train(tmp_path, OutOfMemory("split", 10**9))
    assert not (tmp_path / SNAPSHOT).exists()
    allow(0.6)
    callback = OutOfMemory("split", 10**9, history)
    found = train(tmp_path, callback)
    assert callback.parts.size in (1, 2, 4, 8)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert "repeated in parts of 8" in caplog.text
    assert "https://pytorch.org/memory_viz" in caplog.text
    snapshot = pickle.loads((tmp_path / SNAPSHOT).read_bytes())
    assert snapshot["segments"]
    assert any(snapshot["device_traces"]) == history


def test_forward_passes_go_on_in_parts(allow: Callable[[float], None]):
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).cuda().eval()
    images = torch.rand(32, 3, 256, 256, device="cuda")
    with torch.inference_mode():
        expected = network(images)
        allow(0.7)
        in_parts = InParts(network)
        torch.testing.assert_close(in_parts(images), expected)
    assert in_parts.size is not None


def test_the_memory_in_words():
    device = torch.device("cuda", torch.cuda.current_device())
    held = torch.zeros(2**20 * 10, device=device)
    numbers = [int(word) for word in memory_state(device).split() if word.isdigit()]
    allocated, reserved, used, total = numbers
    assert held.nbytes // 2**20 <= allocated <= reserved <= used <= total


FAULT = """
from src.engine.steps.out_of_memory import OutOfMemory
from src.engine.runs.errors import run_and_report
from src.engine.runs.fit_errors import explained
from tests.engine.steps.little_memory import Small, fit, noise

def work():
    data = noise()
    data.tensors[1][:] = 99
    with explained(None):
        fit(Small(), OutOfMemory("split", 200), data=data, accelerator="gpu", devices=1)

raise SystemExit(run_and_report(work))
"""


def test_a_label_out_of_range_is_explained():
    """In a process of its own, which cannot use the GPU afterwards."""
    command = [sys.executable, "-c", FAULT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=command_environment())
    assert done.returncode == ExitCode.GPU_FAULT, done.stdout + done.stderr
    assert "0..num_classes-1" in done.stderr
