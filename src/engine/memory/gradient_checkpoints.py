"""memory.checkpoint_gradients: of each block only its input is kept, and the block is computed again in the backward pass.

Chen et al., 2016, https://arxiv.org/abs/1604.06174. The result is the same to the bit: dropout draws the same numbers again,
and BatchNorm takes the statistics of a batch once. timm's own checkpointing updates them twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)


def checkpoint_gradients(backbone: nn.Module, blocks: Sequence[str]) -> None:
    """From here on the blocks are computed twice where gradients are asked for. blocks: names of modules and parameters."""
    modules = dict(backbone.named_modules())
    chosen = [layer for name in blocks if name in modules for layer in _opened(modules[name])]
    for block in chosen:
        block.__class__ = _computed_twice(type(block))
    if not chosen:
        log.warning("memory.checkpoint_gradients=true has no effect: the backbone's blocks are single layers.")


def _opened(block: nn.Module) -> Iterator[nn.Module]:
    """The members of plain sequences, such as the bottlenecks of a ResNet's layer4. Not single layers, whose input is most of
    what they keep."""
    if type(block) is nn.Sequential:
        for member in block:
            yield from _opened(member)
    elif any(True for _ in block.children()):
        yield block


@cache
def _computed_twice(kind: type[nn.Module]) -> Any:
    """A class rather than a wrapper or a hook: names of tensors, copies and replicas stay what they are."""

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *inputs, **named)
        contexts = lambda: (nullcontext(), _buffers_kept(self))  # noqa: E731
        return checkpoint(kind.forward, self, *inputs, use_reentrant=False, context_fn=contexts, **named)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm's statistics are updated a second time."""
    buffers = [buffer for layer in block.modules() if layer.training for buffer in layer.buffers(recurse=False)]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in zip(buffers, kept, strict=True):
                buffer.copy_(values)
