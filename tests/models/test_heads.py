from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import nn

from src.config import Model
from src.models.heads import HEADS, build_head

torch.set_num_threads(1)


def layers(head: nn.Module) -> list[str]:
    return [str(layer) for layer in head.modules() if not any(layer.children())]


def test_heads_are_made_of_what_their_description_says():
    linear = "Linear(in_features=8, out_features=3, bias=True)"
    assert layers(build_head("linear", 8, 3, 16, 0.0)) == [linear]
    assert layers(build_head("linear", 8, 3, 16, 0.5)) == ["Dropout(p=0.5, inplace=False)", linear]
    assert layers(build_head("mlp", 8, 3, 16, 0.5)) == [
        "Linear(in_features=8, out_features=16, bias=True)",
        "ReLU()",
        "Dropout(p=0.5, inplace=False)",
        "Linear(in_features=16, out_features=3, bias=True)",
    ]
    assert layers(build_head("append", 1000, 3, 16, 0.5)) == ["Linear(in_features=1000, out_features=3, bias=True)"]


def test_the_config_offers_every_head():
    options = next(field.metadata["options"] for field in fields(Model) if field.name == "head")
    assert options == tuple(HEADS)


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_turns_features_into_logits(kind):
    assert build_head(kind, 8, 3, 16, 0.1)(torch.randn(4, 8)).shape == (4, 3)
