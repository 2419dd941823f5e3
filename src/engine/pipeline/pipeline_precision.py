"""What the stages of strategy=pipeline agree on before an optimizer step, because no process has all gradients.

Gradients are clipped by the norm of those of all stages. With fp16 all stages skip a step when the gradients of one
overflowed: otherwise they would go on with different steps and different loss scales.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import precision
from torch import Tensor
from torch.optim import Optimizer

from src.engine.steps.precision import LIGHTNING_NAMES


def stage_precision(name: str, device: torch.device) -> precision.Precision:
    """What Lightning's Trainer needs for fp32, fp16 or bf16, in its plugins. device: that of the stage."""
    if name == "fp32":
        return FullPrecision(device.type)
    return MixedPrecision(LIGHTNING_NAMES[name], device.type, StageScaler(device.type) if name == "fp16" else None)


class _NormOfAllStages(precision.Precision):
    device: str  # the kind of device: cpu, cuda

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """By the norm of the unsplit network, to the bit: the norm of all parameters' norms, in their order. A process knows
        those of its stage."""
        learning = [parameter for parameter in self.main_params(optimizer) if parameter.requires_grad]
        norms = torch.zeros(len(learning), device=self.device)
        for index, parameter in enumerate(learning):
            if parameter.grad is not None:
                norms[index] = torch.nn.utils.get_total_norm([parameter.grad])
        dist.all_reduce(norms)
        torch.nn.utils.clip_grads_with_norm_(learning, clip_val, torch.linalg.vector_norm(norms))


class FullPrecision(_NormOfAllStages):
    """fp32."""

    def __init__(self, device: str) -> None:
        self.device = device


class MixedPrecision(_NormOfAllStages, precision.MixedPrecision):
    """fp16 and bf16. Lightning saves the loss scale under the name of this class, which is that of its own: other strategies
    find it there."""


class StageScaler(torch.amp.GradScaler):
    """A loss scale that is the same in all stages. A stage without gradients goes by the others."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Whether a gradient of any stage overflowed, for each device."""
        overflowed = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        anywhere = torch.stack([found_inf, *overflowed.values()]).max()
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return {anywhere.device: anywhere}
