"""strategy=dp on real GPUs: pytest -m gpu. One GPU takes the place of two, where there are not two."""

from __future__ import annotations

import pytest
import torch

from src.engine.dp.data_parallel import DataParallel
from src.engine.steps.out_of_memory import OutOfMemory
from src.engine.steps.precision import DTYPES, precision_plugin
from tests.engine.dp.test_data_parallel import largest_difference, train
from tests.engine.steps import little_memory
from tests.engine.steps.little_memory import at_most
from tests.engine.steps.test_out_of_memory import Plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=[(0, 0), pytest.param((1, 0), marks=TWO)], ids=["one GPU", "two GPUs"])
def dp(request) -> DataParallel:
    strategy = DataParallel()
    strategy.parallel_devices = [torch.device("cuda", index) for index in request.param]
    return strategy


def test_dp_learns_what_one_gpu_learns(dp):
    expected, single, steps = train(None, accelerator="gpu")
    found, trainer, watch = train(None, accelerator="gpu", strategy=dp)
    assert watch.losses == pytest.approx(steps.losses, abs=1e-4)
    assert largest_difference(expected, found) < 1e-4
    assert trainer.callback_metrics["val/acc"] == single.callback_metrics["val/acc"]
    assert [images for _, images in watch.calls[:8]].count(3) == 6  # of the first batches; the last has 2 images
    assert not any(main for main, _ in watch.calls)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_precision_of_replicas(dp, precision):
    plugin = precision_plugin(precision, dp.root_device)
    model, _, watch = train(None, accelerator="gpu", strategy=dp, plugins=[plugin])
    assert {dtype for *_, dtype in watch.modes} == {DTYPES[precision]}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(watch.losses[-4:]) < sum(watch.losses[:4])
    assert precision == "bf16" or plugin.scaler.is_enabled()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_that_does_not_fit_on_the_gpus_is_repeated_in_parts(dp, where):
    expected, found, callback = Plain(), Plain(at_most(4), where), OutOfMemory("split", 10**9)
    little_memory.fit(expected, accelerator="gpu", devices=1)
    little_memory.fit(found, callback, accelerator="gpu", devices=1, strategy=dp)
    assert callback.parts.size == 8
    assert largest_difference(expected, found) < 1e-4
