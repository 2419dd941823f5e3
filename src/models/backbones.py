"""Backbones: what build_backbone makes of a name, and the blocks it consists of, for freezing and learning rates.

Their names and preprocessing are in src/engine/weights/backbone_names.py. Nothing here loads weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torchvision
from torch import nn

from src.engine.commands.user_command import corrected
from src.engine.own import is_own
from src.engine.runs.errors import UserError
from src.engine.weights import efficientnet_lite
from src.engine.weights.backbone_names import (
    TIMM_PREFIX,
    check_backbone_name,
    is_timm,
    pretrained_preprocessing,
    timm_package,
)
from src.engine.weights.own_backbone import build_own_backbone
from src.engine.weights.position_size import size_arguments, wrong_size
from src.engine.weights.shape_errors import check_input_size

# What torchvision sets for these two when it is asked for pretrained weights: their input is renormalised inside from
# ImageNet's mean and std to the 0.5 they were trained with. The auxiliary classifiers are for training from scratch and
# make forward() return tuples. init_weights=False leaves PyTorch's initialisation: theirs takes half a minute.
_INCEPTION_ARGUMENTS = {"transform_input": True, "aux_logits": False, "init_weights": False}

# Containers that are opened to get at the blocks; layer1 or denseblock1 are not, they are blocks.
_OPENED = {"features", "classifier", "encoder", "layers", "blocks", "_blocks", "stages", "trunk_output", "heads"}


def build_backbone(
    name: str,
    *,
    keep_classifier: bool,
    image_size: int,
    backbone: nn.Module | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, int]:
    """The network with random weights, and the number of features it gives: (B, 3, S, S) -> (B, features).

    keep_classifier: with the ImageNet classifier, whose 1000 logits are then the features; without it, they are what
    goes into its last layer. backbone: the network, where it was built elsewhere. options: arguments of an own backbone.
    Raises UserError for an unknown name and for an image_size that the network does not take.
    """
    if is_own(name):
        return build_own_backbone(name, keep_classifier, image_size, options or {})
    check_backbone_name(name)
    arguments = size_arguments(name, image_size)
    if is_timm(name):
        backbone = _build_timm(name, keep_classifier, arguments)
    else:
        if name == efficientnet_lite.NAME:
            backbone = efficientnet_lite.build_efficientnet_lite0(image_size)
        elif backbone is None:
            backbone = torchvision.models.get_model(name, weights=None, **(_arguments(name) | arguments))
        if isinstance(backbone, torchvision.models.MNASNet):
            # MNASNet's loader wants a version in the state_dict's metadata, which a plain dict lacks.
            backbone._load_from_state_dict = functools.partial(nn.Module._load_from_state_dict, backbone)
        if not keep_classifier:
            remove_classifier(backbone)
    return backbone, check_input_size(backbone, name, image_size)


def _arguments(name: str) -> dict[str, Any]:
    if name in ("googlenet", "inception_v3"):
        return _INCEPTION_ARGUMENTS
    if name.startswith("vit_"):  # vit_h_14's default weights are for 518, its default size is 224
        return {"image_size": pretrained_preprocessing(name).image_size}
    return {}


def _build_timm(name: str, keep_classifier: bool, size: Mapping[str, int]) -> nn.Module:
    options = size if keep_classifier else {"num_classes": 0, **size}
    try:
        backbone = timm_package().create_model(name.removeprefix(TIMM_PREFIX), pretrained=False, **options)
    except (TypeError, ValueError, AssertionError) as error:
        if not size:
            raise
        fitting = pretrained_preprocessing(name).image_size
        raise wrong_size(name, size["img_size"], f"timm says: {error}", fitting) from error
    if keep_classifier and backbone.num_classes == 0:
        raise UserError(
            f"{name} has no classifier that a head could be appended to",
            where=f"model.backbone={name} model.head=append",
            why="its weights were trained without classes",
            fix=corrected(f"model.backbone={name}", "model.head=linear"),
        )
    return backbone


def remove_classifier(backbone: nn.Module) -> None:
    """Puts nn.Identity in the place of the last layer with 1000 outputs (ImageNet's classes).

    In every torchvision model that is the whole ImageNet-specific part: fc in ResNets, head in Swin, the last of VGG's
    three linear layers, and a 1x1 convolution in SqueezeNet. What follows it there (ReLU, pooling) works on any number
    of channels. Modules before it, such as dropout, stay: they belong to how the features were trained.
    """
    path = [
        name
        for name, layer in backbone.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == 1000)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == 1000)
    ][-1]
    parent, _, last = path.rpartition(".")
    setattr(backbone.get_submodule(parent), last, nn.Identity())


def blocks(backbone: nn.Module) -> list[str]:
    """The names of the backbone's blocks in order, input first: what freezing and learning rates per layer go by.

    They are the module paths that torchinfo shows: the children that have parameters, with containers such as features
    or encoder.layers opened. Every parameter belongs to exactly one block: its name is the block's (a bare parameter,
    such as a ViT's class_token) or starts with the block's and a dot.
    """
    return _blocks(backbone, "")


def _blocks(module: nn.Module, path: str) -> list[str]:
    found = [path + name for name, _ in module.named_parameters(recurse=False)]
    for name, child in module.named_children():
        if name in _OPENED and any(child.children()):
            found += _blocks(child, f"{path}{name}.")
        elif any(True for _ in child.parameters()):
            found.append(path + name)
    return found
