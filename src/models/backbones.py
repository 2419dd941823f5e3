"""Backbones by name: efficientnet_lite0, torchvision's classification models, and timm/NAME.

network.py builds them, run.py checks their names and reads their preprocessing, models/freezing.py asks for their
blocks. Nothing here loads weights: that is weights.py.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.util
from collections.abc import Sequence
from itertools import chain
from types import ModuleType

import torch
import torchvision
from torch import nn

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.weights import efficientnet_lite
from src.engine.weights.preprocessing import INTERPOLATIONS, Preprocessing
from src.engine.weights.shape_errors import Attempt, attempt
from src.models.model_parallel_resnet50 import ModelParallelResNet50

TIMM_PREFIX = "timm/"

# What torchvision sets for these two when it is asked for pretrained weights: their input is renormalised inside from
# ImageNet's mean and std to the 0.5 they were trained with. The auxiliary classifiers are for training from scratch and
# make forward() return tuples. init_weights=False leaves PyTorch's initialisation: theirs takes half a minute.
_INCEPTION_ARGUMENTS = {"transform_input": True, "aux_logits": False, "init_weights": False}

# Containers that are opened to get at the blocks; layer1 or denseblock1 are not, they are blocks.
_OPENED = {"features", "classifier", "encoder", "layers", "blocks", "_blocks", "stages", "trunk_output", "heads"}


def backbone_names() -> list[str]:
    """All names except timm's more than a thousand, which timm.list_models() lists."""
    return [efficientnet_lite.NAME, *torchvision.models.list_models(module=torchvision.models)]


def is_timm(name: str) -> bool:
    return name.startswith(TIMM_PREFIX)


def check_backbone_name(name: str) -> None:
    """Raises UserError unless there is such a backbone and its package is installed."""
    if is_timm(name):
        _check_timm_name(name)
    elif name not in backbone_names():
        why = "the names are efficientnet_lite0, those of torchvision.models, and timm/NAME"
        if importlib.util.find_spec("timm") and _timm().is_model(name):
            raise _unknown(name, [TIMM_PREFIX + name], "timm has a model of that name; " + why)
        family = [each for each in backbone_names() if name and each.startswith(name.lower())][:5]
        raise _unknown(name, _close(name, backbone_names()) or family, why)


def _check_timm_name(name: str) -> None:
    timm, wanted = _timm(), name.removeprefix(TIMM_PREFIX)
    architecture, _, tag = wanted.partition(".")
    if not timm.is_model(architecture):
        raise _unknown(name, _close(architecture, timm.list_models(), TIMM_PREFIX), "timm has no model of that name")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and wanted not in tagged:
        close = _close(wanted, tagged, TIMM_PREFIX) or [TIMM_PREFIX + architecture]
        raise _unknown(name, close, f"timm has no weights '{tag}' for {architecture}")


def _close(name: str, names: Sequence[str], prefix: str = "") -> list[str]:
    return [prefix + match for match in difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.6)]


def _unknown(name: str, close: list[str], why: str) -> UserError:
    return UserError(
        f"there is no backbone {name!r}" + (f"; close to it: {', '.join(close)}" if close else ""),
        where=f"model.backbone={name}",
        why=why,
        fix=corrected(f"model.backbone={close[0] if close else 'resnet18'}"),
    )


def _timm() -> ModuleType:
    """timm, imported only when it is asked for: it takes seconds, and is an extra."""
    if importlib.util.find_spec("timm") is None:
        raise UserError(
            "backbones named timm/NAME need the package timm, which is not installed",
            where="model.backbone",
            why="timm is an extra of this project",
            fix='pip install -e ".[timm]"',
            code=ExitCode.UNAVAILABLE,
        )
    import timm

    return timm


def pretrained_preprocessing(name: str) -> Preprocessing:
    """The preprocessing that belongs to the backbone's default weights. Raises UserError for an unknown name."""
    check_backbone_name(name)
    if name == efficientnet_lite.NAME:
        return efficientnet_lite.PREPROCESSING
    if is_timm(name):
        timm = _timm()
        cfg = timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX)).to_dict()
        data = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
        _, height, size = data["input_size"]
        if height != size:
            raise UserError(
                f"{name} was trained on images of {height} x {size} pixels, which are no squares",
                why="images are resized and cut to squares here, and its position embeddings would not fit them",
                fix=corrected("model.backbone=timm/vit_base_patch16_224"),
            )
        ratio, interpolation, mean, std = (data[key] for key in ("crop_pct", "interpolation", "mean", "std"))
        how = {"crop_mode": data["crop_mode"] or "center", "rounding": "floor"}
    else:
        steps = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        size, interpolation = steps.crop_size[0], steps.interpolation.value
        ratio = size / steps.resize_size[0]
        mean, std, how = steps.mean, steps.std, {}
    if interpolation not in INTERPOLATIONS:
        interpolation = "bicubic"
    return Preprocessing(size, ratio, interpolation, tuple(mean), tuple(std), **how)


def build_backbone(
    name: str, *, keep_classifier: bool, image_size: int, split_at: Sequence[str] | None = None
) -> tuple[nn.Module, int]:
    """The network with random weights, and the number of features it gives: (B, 3, S, S) -> (B, features).

    keep_classifier: with the ImageNet classifier, whose 1000 logits are then the features; without it, they are what
    goes into its last layer. split_at: the layers after which it is cut into stages (resnet50 only).
    Raises UserError for an unknown name and for an image_size that the network does not take.
    """
    check_backbone_name(name)
    _check_fixed_size(name, image_size)
    if is_timm(name):
        backbone = _build_timm(name, keep_classifier)
    else:
        if name == efficientnet_lite.NAME:
            backbone = efficientnet_lite.build_efficientnet_lite0(image_size)
        elif split_at is not None:
            assert name == "resnet50", "config_checks.py refuses others"
            backbone = ModelParallelResNet50(split_at=split_at)
        else:
            backbone = torchvision.models.get_model(name, weights=None, **_arguments(name))
        if isinstance(backbone, torchvision.models.MNASNet):
            # MNASNet's loader wants a version in the state_dict's metadata, which a plain dict lacks.
            backbone._load_from_state_dict = functools.partial(nn.Module._load_from_state_dict, backbone)
        if not keep_classifier:
            remove_classifier(backbone)
    return backbone, check_input_size(backbone, name, image_size)


def _arguments(name: str) -> dict[str, object]:
    if name in ("googlenet", "inception_v3"):
        return _INCEPTION_ARGUMENTS
    if name.startswith("vit_"):  # vit_h_14's default weights are for 518, its default size is 224
        return {"image_size": pretrained_preprocessing(name).image_size}
    return {}


def _build_timm(name: str, keep_classifier: bool) -> nn.Module:
    options = {} if keep_classifier else {"num_classes": 0}
    backbone = _timm().create_model(name.removeprefix(TIMM_PREFIX), pretrained=False, **options)
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


def _check_fixed_size(name: str, image_size: int) -> None:
    """Vision transformers learn one embedding per position: another size has other positions."""
    if is_timm(name):
        fixed = bool(_timm().get_pretrained_cfg(name.removeprefix(TIMM_PREFIX)).fixed_input_size)
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
    tried = _try_size(backbone, image_size)
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


def _try_size(backbone: nn.Module, image_size: int) -> Attempt:
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
        if _try_size(backbone, middle).error is None:
            enough = middle
        else:
            too_small = middle
    return enough


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
