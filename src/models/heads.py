"""What is trained on top of a backbone, and the explanation when a head and a backbone do not fit.

network.py builds the head from the config's model.head; run.py asks explain_shape_mismatch about a RuntimeError of a
training step. To use a head of your own, add a kind to build_head: it gets features (B, in_features) and must give
logits (B, outputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from src.errors import UserError
from src.user_command import corrected

HEADS = ("linear", "mlp", "append")


def build_head(kind: str, in_features: int, outputs: int, hidden: int, dropout: float) -> nn.Module:
    """features (B, in_features) -> logits (B, outputs), with random weights.

    linear: one layer. The default: with a good backbone the classes are close to linearly separable.
    mlp:    a hidden layer of `hidden` units with ReLU. For images far from ImageNet and a backbone that stays frozen.
    append: one layer behind the backbone's own classifier, whose 1000 ImageNet logits are the features. The form often
            taught in lectures; it keeps the pretrained classifier, and trains 1000 * outputs weights.
    dropout: of what goes into the last layer, in training; not used by append.
    Raises UserError for another kind.
    """
    if kind == "linear":
        linear = nn.Linear(in_features, outputs)
        return nn.Sequential(nn.Dropout(dropout), linear) if dropout > 0 else linear
    if kind == "mlp":
        return nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))
    if kind == "append":
        return nn.Linear(in_features, outputs)
    raise UserError(
        f"there is no head {kind!r}",
        where=f"model.head={kind}",
        why=f"the heads are {', '.join(HEADS)}; src/models/heads.py is the place to add one",
        fix=corrected("model.head=linear"),
    )


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

    Hooks and each module's train or eval mode are put back; BatchNorm statistics do not move in eval mode.
    """
    inside: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple) -> None:
            shape = tuple(inputs[0].shape) if inputs and isinstance(inputs[0], Tensor) else ()
            inside.append((name, layer, shape))

        return hook

    def leave(*_: object) -> None:
        inside.pop()

    modes = [(module, module.training) for module in network.modules()]
    hooks = []
    for name, layer in network.named_modules():
        if not any(layer.children()):
            hooks += [layer.register_forward_pre_hook(enter(name)), layer.register_forward_hook(leave)]
    network.eval()
    try:
        with torch.no_grad():
            return Attempt(output=forward())
    except Exception as error:
        name, layer, shape = inside[-1] if inside else ("", None, ())
        return Attempt(error=error, name=name, layer=layer, shape=shape)
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
    if isinstance(layer, _ConvNd | _BatchNorm):
        channels = layer.in_channels if isinstance(layer, _ConvNd) else layer.num_features
        flat = isinstance(layer, nn.BatchNorm1d | nn.Conv1d)
        fits = len(shape) >= (2 if isinstance(layer, nn.BatchNorm1d) else 3 if flat else 4) and shape[1] == channels
        return "" if fits else f"(B, {channels}{', ...' if flat else ', H, W'})"
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
