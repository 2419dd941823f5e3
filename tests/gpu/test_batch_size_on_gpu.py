"""data.batch_size=auto where memory really runs out: pytest -m gpu."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from src.config import Config, Optimizer, Precision
from src.engine.batch_size.batch_size import find_batch_size
from src.engine.images.labelled_images import LabelledImages
from src.engine.processes.ranks import Ranks
from src.engine.runs.job import Job
from src.engine.weights.preprocessing import Preprocessing
from src.models.freezing import FreezePlan
from src.models.network import Architecture, build_network
from src.task import Task
from src.tasks.multiclass import Multiclass
from tests.conftest import SMALL
from tests.engine.runs.test_model_folder import CARD

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def small_gpu():
    """torch may use 2 GiB of the device and gets real out-of-memory errors beyond."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    yield torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_largest_batch_of_a_gpu(small_gpu, tmp_path, precision):
    """The peak grows with the batch, larger ones run out of memory, and afterwards nothing is different."""
    preprocessing = Preprocessing(128, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    network = build_network(Architecture("resnet18", "linear", 3), preprocessing)
    config = Config(optimizer=Optimizer(name="adamw", lr=0.001), precision=Precision(name=precision))
    images = LabelledImages(("a", "b", "c"), [], [0] * 10**6, {"train": range(10**6)}, read=None)
    freezing = FreezePlan({0: ["head", "backbone"]}, config.trainer.max_epochs)
    task = Task(images, Multiclass(), replace(CARD, preprocessing=preprocessing), network, freezing, origin="")
    before, random_state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()

    size = find_batch_size(Job(config, SimpleNamespace(path=tmp_path), Ranks(), (small_gpu,)), task)

    tried = json.loads((tmp_path / "batch_size.json").read_text())["tried"]
    peaks = [row["peak_mib"] for row in sorted(tried, key=lambda row: row["batch_size"]) if row["fits"]]
    assert size >= 16
    assert peaks[-1] > 2 * peaks[0]
    assert any(row["verdict"] == "out of memory" and row["batch_size"] <= 2 * size for row in tried)
    assert torch.cuda.memory_allocated() - before < 64 * 2**20  # what cuBLAS and cuDNN keep to work in
    assert torch.cuda.get_rng_state().equal(random_state)
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}


def test_a_run_that_finds_its_batch(command, tmp_path):
    words = (*SMALL, "data.batch_size=auto", "data.num_images=400", "trainer.accelerator=gpu", "name=auto")
    done = command("train", *words, "trainer.max_epochs=1")
    assert done.code == 0, done.text
    chosen = json.loads((tmp_path / "runs/auto/batch_size.json").read_text())["batch_size"]
    assert f"data.batch_size=auto: {chosen} (" in done.out
    assert json.loads((tmp_path / "runs/auto/result.json").read_text())["steps"] >= 10
