"""Backbones that learned an embedding for each position, such as vision transformers: how they take another image size.

They are built for the size, and the embeddings of the weights file are resampled to its positions
(https://arxiv.org/abs/2010.11929, section 3.2).
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError
from src.engine.weights.backbone_names import TIMM_PREFIX, is_timm, pretrained_preprocessing, timm_package

PATCH = re.compile(r"(?:patch|^vit_[a-z]_)(\d+)")  # vit_base_patch16_224, vit_b_16


def size_arguments(name: str, image_size: int) -> dict[str, int]:
    """The arguments with which a backbone is built for another size than its weights were trained with; {} where it takes any.
    Raises UserError for a size that its patches do not divide."""
    size = pretrained_preprocessing(name).image_size
    if size == image_size or not _has_positions(name):
        return {}
    patch = int(found[1]) if (found := PATCH.search(name.removeprefix(TIMM_PREFIX))) else 1
    if name.startswith("maxvit_"):  # torchvision's is built of windows that divide 224
        raise wrong_size(name, image_size, f"it takes {size} x {size} only", size)
    if image_size % patch:
        nearest = patch * max(1, round(image_size / patch))
        raise wrong_size(
            name, image_size, f"its patches have {patch} x {patch} pixels, which do not divide that", nearest
        )
    return {"img_size" if is_timm(name) else "image_size": image_size}


def _has_positions(name: str) -> bool:
    if is_timm(name):
        return bool(timm_package().get_pretrained_cfg(name.removeprefix(TIMM_PREFIX)).fixed_input_size)
    return name.startswith(("vit_", "maxvit_"))


def wrong_size(name: str, image_size: int, why: str, fitting: int) -> UserError:
    return UserError(
        f"{name} does not take images of {image_size} x {image_size}",
        where=f"data.image_size={image_size}",
        why=why,
        fix=[
            corrected(f"model.backbone={name}", f"data.image_size={fitting}"),
            corrected("model.backbone=resnet18", f"data.image_size={image_size}"),
        ],
    )


def resampled(value: Tensor, own: Tensor) -> Tensor | None:
    """Position embeddings (1, P + n*n, C) for own's (1, P + m*m, C), where P class and other tokens come first; None where
    they are none."""
    if value.ndim != 3 or own.ndim != 3 or value.shape[::2] != own.shape[::2]:
        return None
    side, own_side = math.isqrt(value.shape[1]), math.isqrt(own.shape[1])
    tokens = value.shape[1] - side**2
    if tokens != own.shape[1] - own_side**2:
        return None
    grid = value[:, tokens:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(own_side, own_side), mode="bicubic", antialias=True)
    return torch.cat([value[:, :tokens].float(), grid.flatten(2).transpose(1, 2)], dim=1)
