"""Optimizer and schedule. Every parameter is in a group from the start, frozen or not: a phase that begins later needs
no new group, so every scheduler works and a resumed run finds the groups it saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, ReduceLROnPlateau

from src.config import Optimizer as OptimizerConfig
from src.engine.commands.schema import METRICS
from src.engine.own import build_part, is_own
from src.engine.steps.network import Network
from src.engine.steps.step_snapshot import BATCHNORM
from src.engine.weights.low_rank import LowRank
from src.models.backbones import blocks

# lr * 0.3 after 3 epochs without improvement: two or three reductions fit into 10 to 30 epochs.
PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.3, 2


def parameter_groups(
    network: Network, config: OptimizerConfig, lr_decay: float | None = None, *, by_shape: bool = False
) -> list[dict[str, Any]]:
    """The backbone and the head, each with and without weight decay (`decays`).

    lr_decay: null, or a group per block of the backbone ('backbone.layer4'), each of which learns with lr_decay times
    the lr of the block after it, so that the general features near the input change least ("discriminative
    fine-tuning", Howard and Ruder, 2018, https://arxiv.org/abs/1801.06146).
    by_shape: decay whatever has two dimensions or more, as this project did once (see build_optimizer).
    """
    lr = config.lr * backbone_lr_scale(network.backbone, config)
    if lr_decay is None:
        rates = {"backbone": lr}
    else:
        names = blocks(network.backbone)
        rates = {f"backbone.{name}": lr * lr_decay ** (len(names) - 1 - i) for i, name in enumerate(names)}
    exempt = _exempt_by_timm(network.backbone)
    groups: list[dict[str, Any]] = []
    for part, rate in (rates | {"head": config.lr}).items():
        named = [(name, p) for name, p in network.named_parameters() if name == part or name.startswith(part + ".")]
        decayed = [p.ndim > 1 if by_shape else decays(name, p) and name not in exempt for name, p in named]
        for name, with_decay, decay in ((part, True, config.weight_decay), (f"{part}/no_decay", False, 0.0)):
            members = [p for (_, p), decays_it in zip(named, decayed, strict=True) if decays_it == with_decay]
            if members:
                groups.append({"params": members, "lr": rate, "weight_decay": decay, "name": name})
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters())), "a parameter in no group"
    return groups


def backbone_lr_scale(backbone: nn.Module, config: OptimizerConfig) -> float:
    """Transformers, ConvNeXts and VGGs, which have no BatchNorm, are usually fine-tuned with 1e-5 to 1e-4 (He et al., 2021,
    https://arxiv.org/abs/2111.06377, table 9); larger steps destroy what they know. Adapters need ten times as much."""
    if config.backbone_lr_scale is not None:
        return config.backbone_lr_scale
    return 0.3 if any(isinstance(layer, (*BATCHNORM, LowRank)) for layer in backbone.modules()) else 0.03


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter: to the weights of layers, which are matrices and kernels.

    Not to biases and norms, which are 1-d, nor to class tokens, position embeddings and biases, layer scales and
    temperatures, whatever their shape. cpb_mlp makes Swin V2's position biases; its authors do not decay it either.
    """
    return parameter.ndim > 1 and "weight" in name.rpartition(".")[2] and "cpb_mlp" not in name


def _exempt_by_timm(backbone: nn.Module) -> set[str]:
    """The parameters that a timm model exempts from weight decay."""
    ask: Callable[[], set[str]] | None = getattr(backbone, "no_weight_decay", None)
    return {f"backbone.{name}" for name in ask()} if callable(ask) else set()


def build_optimizer(
    network: Network,
    config: OptimizerConfig,
    lr_decay: float | None = None,
    saved_group_sizes: Sequence[int] | None = None,
) -> Optimizer:
    """AdamW and SGD skip parameters without a gradient: frozen weights do not change.

    saved_group_sizes: parameters in each group of the optimizer that a run continues with. One that began when weight decay
    also fell on tokens and position embeddings keeps its groups.
    """
    groups = parameter_groups(network, config, lr_decay)
    if saved_group_sizes is not None and list(saved_group_sizes) != [len(group["params"]) for group in groups]:
        groups = parameter_groups(network, config, lr_decay, by_shape=True)
    given = {"groups": groups, "lr": config.lr, "momentum": config.momentum or 0.0}
    return build_part("optimizer.name", config.name, OPTIMIZERS, given, config.options, Optimizer)


def adamw(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """Loshchilov and Hutter, 2019."""
    return torch.optim.AdamW(groups, lr=lr)


def sgd(groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    """With Nesterov's momentum."""
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


# optimizer.name=NAME. Your own, optimizer.name=src.my_optim.lion, gets the same values where it names them.
OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LRScheduler:
    """The schedule of every group's lr, stepped after each step. For plateau only the warm-up: build_plateau is the rest."""
    warmup = round(config.warmup_fraction * total_steps)
    if is_own(config.schedule):
        given = {"optimizer": optimizer, "total_steps": total_steps, "warmup": warmup}
        return build_part("optimizer.schedule", config.schedule, {}, given, config.schedule_options, LRScheduler)
    if config.schedule == "plateau":  # multiplies the current lr; LambdaLR would undo the plateau's reductions
        return LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup + 1))
        progress = min(1.0, max(0, step - warmup) / max(1, total_steps - warmup))
        fall = (1 + math.cos(math.pi * progress)) / 2
        if config.schedule == "constant":
            return rise
        if config.schedule == "onecycle":  # Smith, 2018: from lr/25 up and down to lr/10000, both along a cosine
            if step < warmup:
                return 0.04 + 0.96 * (1 - math.cos(math.pi * step / warmup)) / 2
            return 1e-4 + (1 - 1e-4) * fall
        return rise * fall

    return LambdaLR(optimizer, factor)


def build_plateau(optimizer: Optimizer, metric: str) -> ReduceLROnPlateau:
    """Multiplies every group's lr by 0.3 after three validations in a row without improvement."""
    return ReduceLROnPlateau(optimizer, METRICS.get(metric, "max"), PLATEAU_FACTOR, PLATEAU_PATIENCE, eps=0.0)
