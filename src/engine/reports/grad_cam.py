"""Grad-CAM: where in an image the network found what it answered.

Selvaraju et al. 2017, Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization. The channels of the
last feature map with places are weighed by the mean gradient of the answer's logit, and their sum is shown where positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.network import Network
from src.engine.steps.precision import autocast

COLOUR = (255.0, 60.0, 0.0)


def overlaid(
    model: TrainedModel, images: Tensor, outputs: Sequence[int], signs: Sequence[float]
) -> tuple[Tensor, int] | None:
    """uint8 (B, 3, S, S) -> the same with the heat of each image in red, and the side of the feature map; None of a network
    without one.

    outputs: which logit of each image is explained. signs: -1 where the answer is what makes the logit small.
    """
    network, images = model.network, images.to(model.device)
    with autocast(model.precision, model.device), torch.enable_grad():
        layer = _last_map(network, images[:1])
        if layer is None:
            return None
        maps: list[Tensor] = []

        def hold(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            maps[:] = [output.detach().requires_grad_()]
            return maps[0].clone()  # the next layer may work in place

        hook = layer.register_forward_hook(hold)
        try:
            logits = network(images).float()
        finally:
            hook.remove()
        chosen = logits[range(len(images)), list(outputs)] * torch.tensor(signs, device=logits.device)
        (gradients,) = torch.autograd.grad(chosen.sum(), maps)
    heat = (gradients.float().mean((2, 3), keepdim=True) * maps[0].detach().float()).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat, images.shape[-2:], mode="bilinear")
    heat = 0.7 * heat / heat.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    heat, images = heat.cpu(), images.cpu()  # the stages of a network may be on several devices
    colour = torch.tensor(COLOUR).view(1, 3, 1, 1)
    return (images * (1 - heat) + colour * heat).round().to(torch.uint8), maps[0].shape[-1]


@torch.no_grad()
def _last_map(network: Network, image: Tensor) -> nn.Module | None:
    """The module of the backbone with the last feature map (B, C, H, H), unless tokens without places (B, N, C) come after it,
    as in a ViT."""
    shapes: list[tuple[nn.Module, tuple[int, ...]]] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim > 2:
            shapes.append((module, tuple(output.shape)))

    hooks = [module.register_forward_hook(note) for module in network.backbone.modules()]
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
    while shapes and shapes[-1][1][2:] == (1, 1):  # pooled
        shapes.pop()
    if not shapes or len(shapes[-1][1]) != 4 or shapes[-1][1][2] != shapes[-1][1][3]:
        return None
    return shapes[-1][0]
