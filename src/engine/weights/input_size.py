"""Whether a backbone takes images of a size, found out on the meta device."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError
from src.engine.weights.backbone_names import TIMM_PREFIX, is_timm, pretrained_preprocessing, timm_package
from src.engine.weights.shape_errors import Attempt, attempt


def check_fixed_size(name: str, image_size: int) -> None:
    """Vision transformers learn one embedding per position: another size has other positions."""
    if is_timm(name):
        fixed = bool(timm_package().get_pretrained_cfg(name.removeprefix(TIMM_PREFIX)).fixed_input_size)
    else:
        fixed = name.startswith(("vit_", "maxvit_"))
    size = pretrained_preprocessing(name).image_size if fixed else image_size
    if size != image_size:
        raise UserError(
            f"{name} takes images of {size} x {size} only, not {image_size} x {image_size}",
            where=f"data.image_size={image_size}",
            why="its position embeddings were learned for that size",
            fix=[
                corrected(f"model.backbone={name}", f"data.image_size={size}"),
                corrected("model.backbone=resnet18", f"data.image_size={image_size}"),
            ],
        )


def check_input_size(backbone: nn.Module, name: str, image_size: int) -> int:
    """The number of features that one image of this size gives. Raises UserError when it does not get through.

    The image is sent through on the meta device: shapes only, in milliseconds. Should that fail, the real network has
    the last word, since not every operation of every timm model runs on meta.
    """
    tried = try_size(backbone, image_size)
    if tried.error is not None and next(backbone.parameters()).device.type != "meta":
        device = next(backbone.parameters()).device
        tried = attempt(backbone, lambda: backbone(torch.zeros(1, 3, image_size, image_size, device=device)))
    if tried.output is not None:
        return tried.output.numel()
    size = _smallest_size(backbone, image_size, pretrained_preprocessing(name).image_size)
    layer = f"its layer '{tried.name}' ({type(tried.layer).__name__}) was left with a map of {tried.shape[1:]}; "
    raise UserError(
        f"{name} cannot take images of {image_size} x {image_size}; the smallest it takes are {size} x {size}",
        where=f"data.image_size={image_size}",
        why=(layer if tried.layer is not None else "") + f"torch says: {str(tried.error).splitlines()[0]}",
        fix=[
            corrected(f"model.backbone={name}", f"data.image_size={size}"),
            corrected("model.backbone=efficientnet_lite0", f"data.image_size={image_size}"),
        ],
    )


def try_size(backbone: nn.Module, image_size: int) -> Attempt:
    """A forward pass of one image with every parameter and buffer replaced by a meta tensor."""
    # A copy: torch.func.functional_call leaves meta tensors in layers that the network has under two names. What the
    # memo maps to a meta tensor is not copied first.
    memo = {id(tensor): tensor.to("meta") for tensor in chain(backbone.parameters(), backbone.buffers())}
    twin = copy.deepcopy(backbone, memo)
    return attempt(twin, lambda: twin(torch.zeros(1, 3, image_size, image_size, device="meta")))


def _smallest_size(backbone: nn.Module, too_small: int, enough: int) -> int:
    """The smallest size that gets through, by halving; `enough` is what the weights were trained with."""
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        if try_size(backbone, middle).error is None:
            enough = middle
        else:
            too_small = middle
    return enough
