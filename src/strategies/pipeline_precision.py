"""What the stages of strategy=pipeline must agree on before an optimizer step, since no process has all gradients.

Gradients are clipped by the norm of those of all stages. With fp16 all stages skip a step when the gradients of one
overflowed: otherwise they would go on with different steps and different loss scales.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import precision
from torch import Tensor
from torch.optim import Optimizer

from src.strategies.precision import LIGHTNING_NAMES


def stage_precision(name: str, device: torch.device) -> precision.Precision:
    """What Lightning's Trainer needs for fp32, fp16 or bf16, in its plugins. device: that of the stage."""
    if name == "fp32":
        return FullPrecision(device.type)
    return MixedPrecision(LIGHTNING_NAMES[name], device.type, StageScaler(device.type) if name == "fp16" else None)


class _NormOfAllStages(precision.Precision):
    device: str  # the kind of device: cpu, cuda

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """The norm is that of the unsplit network, to the bit: it is taken of the norms of all parameters that learn, in
        their order, and each is known to the process of its stage."""
        learning = [parameter for parameter in self.main_params(optimizer) if parameter.requires_grad]
        own = [index for index, parameter in enumerate(learning) if parameter.grad is not None]
        norms = torch.zeros(len(learning), device=self.device)
        if own:
            norms[own] = torch.stack(torch._foreach_norm([learning[index].grad for index in own]))
        dist.all_reduce(norms)
        torch.nn.utils.clip_grads_with_norm_(learning, clip_val, torch.linalg.vector_norm(norms))


class FullPrecision(_NormOfAllStages):
    """fp32."""

    def __init__(self, device: str) -> None:
        self.device = device


class MixedPrecision(_NormOfAllStages, precision.MixedPrecision):
    """fp16 and bf16. It has the name of Lightning's, under which the loss scale is in a checkpoint: so all strategies find
    it there."""


class StageScaler(torch.amp.GradScaler):
    """A loss scale that is the same in all stages. A stage without gradients goes by the others."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Whether a gradient overflowed, on each device that has some: here in any stage."""
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        anywhere = torch.stack([found_inf, *found.values()]).max()
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return {anywhere.device: anywhere}
