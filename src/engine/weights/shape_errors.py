"""Which layer of a network does not fit its input, found by a forward pass that watches every layer.

building.py explains a head that does not fit its backbone; input_size.py looks for the smallest images a backbone takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from src.engine.runs.errors import UserError


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
    kind, got = type(failed.layer).__name__, _as_text(failed.shape)
    return UserError(
        f"layer '{failed.name}' ({kind}) expects an input of shape {expected} and got {got}",
        where=f"{failed.name}: {failed.layer}",
        why=f"the layers before it give another size than it was built for; torch says: {str(error).splitlines()[0]}",
        fix=_fix(failed.layer, failed.shape),
    )


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


def _as_text(shape: tuple[int, ...]) -> str:
    """The batch is called B: only one of its images was sent through."""
    return f"({', '.join(['B', *map(str, shape[1:])])})"


def _fix(layer: nn.Module, shape: tuple[int, ...]) -> str:
    if isinstance(layer, nn.Linear) and len(shape) == 4:
        size = math.prod(shape[1:])
        return f"put nn.Flatten() before it and build it as nn.Linear({size}, {layer.out_features})"
    if isinstance(layer, nn.Linear):
        return f"build it as nn.Linear({shape[-1]}, {layer.out_features})"
    channels = shape[-1] if isinstance(layer, nn.LayerNorm) else shape[min(1, len(shape) - 1)]
    return f"build it for {channels} channels, or change the layer before it"
