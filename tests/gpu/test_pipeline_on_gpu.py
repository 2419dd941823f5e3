"""A split network on a real GPU: pytest -m gpu."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet50

from src.models.model_parallel_resnet50 import ModelParallelResNet50

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_both_stages_of_a_resnet50_on_one_gpu():
    torch.manual_seed(0)
    split = ModelParallelResNet50(num_classes=3, devices=["cuda:0", "cuda:0"], split_at=["layer2"])
    whole = resnet50(num_classes=3).cuda()
    whole.load_state_dict(split.state_dict())
    images = torch.randn(4, 3, 64, 64)
    logits = split(images)
    expected = whole(images.cuda())
    torch.testing.assert_close(logits, expected)
    for result in (logits, expected):
        result.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in split.named_parameters()}
    torch.testing.assert_close(gradients, {name: p.grad for name, p in whole.named_parameters()}, rtol=1e-3, atol=1e-4)
