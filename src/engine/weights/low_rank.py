"""Low-rank adapters (LoRA; Hu et al., 2021, https://arxiv.org/abs/2106.09685): freeze.lora_rank.

Each weight W of an attention becomes W + SCALE / rank * up @ down: W is frozen, down (rank, inputs) begins random, up (outputs,
rank) with zeros. Whoever reads the weight gets the sum: the layer's own forward, and code that passes the weight of a layer on,
as torch's attention, Swin and BEiT do. So a network with adapters computes what the merged one does.

src/task.py adds the adapters. Checkpoints hold W, up and down; whatever chooses, averages or packages
weights merges them first. An average is thus the mean of merged weights, and model/ is a plain network's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from src.engine.commands.user_command import corrected
from src.engine.runs import seeding
from src.engine.runs.errors import UserError

log = logging.getLogger(__name__)

SCALE = 16  # over the rank, so that another rank needs no other learning rate (section 4.1): 2 with the usual rank of 8
INTO = {"qkv", "to_qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj"}  # layers that only an attention has
OUT_OF = {"proj", "out_proj", "merge"}  # what may come behind them
DOWN, UP = ".lora.down_weight", ".lora.up_weight"  # ends of names; X.lora.weight is the frozen weight of the layer X


class LowRank(nn.Module):
    """Gives the weight of a layer. key: its name there and here, weight or in_proj_weight."""

    def __init__(self, key: str, weight: nn.Parameter, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.key = key
        self.register_parameter(key, weight)
        self.down_weight = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up_weight = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down_weight, math.sqrt(5), generator=generator)  # as nn.Linear does

    def forward(self) -> Tensor:
        return _sum(getattr(self, self.key), self.down_weight, self.up_weight)


def _sum(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):  # in fp32, as when it is merged
        return torch.addmm(weight, up, down, alpha=SCALE / len(down))


def add_adapters(backbone: nn.Module, rank: int, seed: int) -> None:
    """Outputs stay the same at first. Nothing for rank 0. Raises UserError for a backbone without attention."""
    layers = list(dict.fromkeys(found for module in backbone.modules() for found in _layers(module))) if rank else []
    if rank and not layers:
        raise UserError(
            f"freeze.lora_rank={rank}: the backbone has no attention to adapt",
            where="model.backbone",
            why="adapters belong to the attention of transformers: torchvision's vit_* and swin_*, and timm's with vit, deit, "
            "beit, eva or swin in their names",
            fix=[corrected("model.backbone=vit_b_16"), corrected(remove=["freeze.lora_rank"])],
        )
    for number, (layer, key) in enumerate(layers):
        adapter = LowRank(key, getattr(layer, key), rank, seeding.generator(seed, "adapter", number))
        delattr(layer, key)
        layer.add_module("lora", adapter)
        layer.__class__ = _adapted(type(layer), key)
    if rank:
        size = sum(parameter.numel() for name, parameter in backbone.named_parameters() if is_adapter(name))
        log.info(f"adapters  rank {rank}, {size:,} parameters beside {len(layers)} weights of the attention")
        log.info("          they change the features, so epochs in which they learn keep none")


def _layers(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The layers of an attention, with the names of their weights. torch's holds those of q, k and v in one parameter."""
    linear = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        yield module, "in_proj_weight"
    elif not linear.keys() & INTO:
        return
    yield from ((child, "weight") for name, child in linear.items() if name in INTO | OUT_OF)


@cache
def _adapted(kind: type[nn.Module], key: str) -> Any:
    """A class rather than a hook or a wrapper: code that reads the weight without a call of the layer gets the sum as well."""
    return type(kind.__name__, (kind,), {key: property(lambda layer: layer.lora()), "__module__": kind.__module__})


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name learns while the frozen weights do not."""
    return name.endswith((DOWN, UP))


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Makes it a plain network, with the same outputs."""
    for layer in [*network.modules()]:
        if isinstance(adapter := getattr(layer, "lora", None), LowRank):
            layer.__class__ = type(layer).__bases__[0]
            del layer.lora
            layer.register_parameter(adapter.key, nn.Parameter(adapter(), requires_grad=False))


@torch.no_grad()
def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network as `merge` would leave it. That of a plain network as it is."""
    plain = {}
    for name, tensor in state.items():
        layer, _, key = name.rpartition(".lora.")
        if not {layer + DOWN, layer + UP} <= state.keys():
            plain[name] = tensor
        elif not is_adapter(name):
            plain[f"{layer}.{key}"] = _sum(tensor, state[layer + DOWN], state[layer + UP])
    return plain
