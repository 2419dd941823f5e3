"""Optimizer and schedule. Every parameter is in a group from the start, frozen or not: a phase that begins later needs
no new group, so every scheduler works and a resumed run finds the groups it saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from src.config import Optimizer as OptimizerConfig


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Four groups: backbone and head, each with and without weight decay. Biases and norms (1-d) are not decayed."""
    groups: list[dict[str, Any]] = []
    for part, lr in (("backbone", config.lr * config.backbone_lr_scale), ("head", config.lr)):
        parameters = list(getattr(network, part).parameters())
        for name, members, decay in (
            (part, [p for p in parameters if p.ndim > 1], config.weight_decay),
            (f"{part}/no_decay", [p for p in parameters if p.ndim <= 1], 0.0),
        ):
            if members:
                groups.append({"params": members, "lr": lr, "weight_decay": decay, "name": name})
    return groups


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW skips parameters without a gradient, and so does SGD: the frozen ones stay as they are."""
    groups = parameter_groups(network, config)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum or 0.0, nesterov=bool(config.momentum))
    return torch.optim.AdamW(groups, lr=config.lr)


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LRScheduler:
    """A factor on every group's lr as a function of the step alone, so that a resumed run goes on exactly."""
    warmup = round(config.warmup_fraction * total_steps)

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
