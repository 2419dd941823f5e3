"""Features that a GPU computes once: pytest -m gpu."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import SMALL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_head_learns_from_features_what_it_learns_from_images(command, tmp_path, precision):
    words = (
        *SMALL,
        "trainer.accelerator=gpu",
        "freeze.preset=head_only",
        "data.augment=none",
        f"precision={precision}",
    )
    for name, views in (("features", 1), ("images", 0)):
        assert command("train", *words, "optimizer.lr=0.05", f"feature_bank.views={views}", f"name={name}").code == 0
    results = [json.loads((tmp_path / f"runs/{name}/result.json").read_text()) for name in ("features", "images")]
    assert results[0]["device"] == "cuda"
    assert results[0]["metrics"]["test/loss"] == pytest.approx(results[1]["metrics"]["test/loss"], rel=2e-2)


def test_the_baseline_is_fitted_on_the_gpu(command, tmp_path):
    done = command("train", *SMALL, "trainer.accelerator=gpu", "model=features", "baseline=only", "name=x")
    assert done.code == 0, done.text
    found = json.loads((tmp_path / "runs/x/result.json").read_text())
    assert found["metrics"] == pytest.approx(found["baseline"]["metrics"], abs=1e-3)
