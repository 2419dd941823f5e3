"""What only a GPU shows about growing memory: pytest -m gpu tests/gpu/test_memory_growth_on_gpu.py."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from tests.engine.memory_growth.test_memory_growth import ENOUGH, SumOfLosses, classifier, fit, image_data, warnings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class KeepsLogits(L.Callback):
    def __init__(self) -> None:
        self.outputs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(pl_module(batch[0]))


@pytest.mark.parametrize(
    ("kind", "callbacks", "name", "place"),
    [
        (SumOfLosses, [], "SumOfLosses.total_loss: ", "RAM."),
        (None, [KeepsLogits()], "KeepsLogits.outputs: ", "the GPU."),
    ],
    ids=["graphs in RAM", "tensors on the GPU"],
)
def test_growth_is_found(caplog, kind, callbacks, name, place):
    module = classifier(kind) if kind else classifier()
    fit(module, image_data(2 * ENOUGH, 1), *callbacks, accelerator="gpu")
    (warning,) = warnings(caplog)
    assert warning.splitlines()[0].endswith(place)
    assert name in warning


@pytest.mark.parametrize("workers", [0, 2])
def test_no_alarm_in_a_healthy_loop(caplog, workers):
    fit(classifier(), image_data(125, 30, workers), epochs=4, accelerator="gpu")
    assert warnings(caplog) == []
