"""Which layer of a network does not fit its input, and the smallest images a backbone takes: found by forward passes that
watch every layer. src/models/building.py explains a head that does not fit its backbone, backbones.py checks data.image_size.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError
from src.engine.weights.backbone_names import pretrained_preprocessing


@dataclass(frozen=True)
class Attempt:
    """One forward pass: its output, or the error and the layer that was being computed, if it was in one."""

    output: Tensor | None = None
    error: Exception | None = None
    name: str = ""  # the layer's path in the network; "" when the error came from code between layers
    layer: nn.Module | None = None
    shape: tuple[int, ...] = ()  # of the tensor that the layer was given


def attempt(network: nn.Module, forward: Callable[[], Tensor]) -> Attempt:
    """Runs forward(), which must call the network, without gradients and in eval mode, and watches its layers.

    Each module's train or eval mode is put back; BatchNorm statistics do not move in eval mode.
    """
    names = {layer: name for name, layer in network.named_modules() if not any(layer.children())}
    modes = [(module, module.training) for module in network.modules()]
    running = Attempt()

    def enter(layer: nn.Module, inputs: tuple) -> None:
        nonlocal running
        if layer in names:
            shape = tuple(inputs[0].shape) if inputs and isinstance(inputs[0], Tensor) else ()
            running = Attempt(name=names[layer], layer=layer, shape=shape)

    def leave(*_: object) -> None:
        nonlocal running
        running = Attempt()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        with torch.no_grad():
            network.eval()
            return Attempt(output=forward())
    except Exception as error:
        return replace(running, error=error)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


def explain_shape_mismatch(error: RuntimeError, network: nn.Module, images: Tensor) -> UserError | None:
    """A UserError that names the layer whose input does not fit, or None when the error is about something else.

    error: what the forward pass raised, such as "mat1 and mat2 shapes cannot be multiplied (4x8 and 25088x3)".
    images: (B, 3, H, W), the network's input; the first one is sent through again to find the layer.
    The layer's own sizes are compared with what came in; the error's text, which changes with torch, is only passed on.
    """
    failed = attempt(network, lambda: network(images[:1]))
    if failed.error is None or failed.layer is None or not failed.shape:
        return None
    expected = _expected_input(failed.layer, failed.shape)
    if not expected:
        return None
    # The batch is called B: only one of its images was sent through.
    kind, got = type(failed.layer).__name__, f"({', '.join(['B', *map(str, failed.shape[1:])])})"
    found = f"layer '{failed.name}' ({kind}) expects an input of shape {expected} and got {got}"
    why = f"the layers before it give another size than it was built for; torch says: {str(error).splitlines()[0]}"
    return UserError(found, where=f"{failed.name}: {failed.layer}", why=why, fix=_fix(failed.layer, failed.shape))


def _expected_input(layer: nn.Module, shape: tuple[int, ...]) -> str:
    """The shape the layer takes, as text; "" when the given one fits or the layer is of a kind not known here."""
    if isinstance(layer, nn.Linear):
        return "" if shape[-1] == layer.in_features else f"(..., {layer.in_features})"
    if isinstance(layer, nn.LayerNorm):
        sizes = tuple(layer.normalized_shape)
        return "" if shape[-len(sizes) :] == sizes else f"(..., {', '.join(map(str, sizes))})"
    if isinstance(layer, nn.BatchNorm1d):
        fits = len(shape) >= 2 and shape[1] == layer.num_features
        return "" if fits else f"(B, {layer.num_features}, ...)"
    if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.num_features
        return "" if len(shape) == 4 and shape[1] == channels else f"(B, {channels}, H, W)"
    return ""


def _fix(layer: nn.Module, shape: tuple[int, ...]) -> str:
    if isinstance(layer, nn.Linear) and len(shape) == 4:
        size = math.prod(shape[1:])
        return f"put nn.Flatten() before it and build it as nn.Linear({size}, {layer.out_features})"
    if isinstance(layer, nn.Linear):
        return f"build it as nn.Linear({shape[-1]}, {layer.out_features})"
    channels = shape[-1] if isinstance(layer, nn.LayerNorm) else shape[min(1, len(shape) - 1)]
    return f"build it for {channels} channels, or change the layer before it"


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
    """The smallest size that gets through; `enough` is what the weights were trained with."""
    sizes = range(too_small + 1, enough)
    return too_small + 1 + bisect_left(sizes, True, key=lambda size: try_size(backbone, size).error is None)
