"""A backbone of the owner's: model.backbone=src.my_nets.Tiny."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from src.engine.commands.user_command import corrected
from src.engine.own import build_part, owner_errors, wrong_result
from src.engine.runs.errors import UserError


def build_own_backbone(
    name: str, keep_classifier: bool, size: int, options: Mapping[str, Any]
) -> tuple[nn.Module, int]:
    """A function or class that gives a module: float (B, 3, S, S) -> features (B, F), or a map (B, F, H, W), whose mean
    over the places the head gets. It is called with image_size where it asks for it."""
    if keep_classifier:
        raise UserError(
            f"model.head=append does not go with model.backbone={name}",
            why="it comes after the ImageNet classifier of a backbone that has one",
            fix=corrected("model.head=linear"),
        )
    backbone = build_part("model.backbone", name, {}, {"image_size": size}, options, nn.Module)
    with owner_errors("model.backbone", name), torch.no_grad():
        output = backbone.eval()(torch.zeros(2, 3, size, size))
    if not isinstance(output, torch.Tensor) or output.ndim not in (2, 4) or len(output) != 2:
        found = (
            f"an output of {tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        )
        raise wrong_result("model.backbone", name, f"(2, F) or (2, F, H, W) for images (2, 3, {size}, {size})", found)
    return backbone.train(), output.shape[1]
