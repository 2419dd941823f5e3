"""strategy.sync_batchnorm=true: BatchNorm statistics of the whole batch, over all processes of ddp. Made by src/trainer.py.

torch.nn.SyncBatchNorm.convert_sync_batchnorm, which Lightning uses, puts a plain SyncBatchNorm in the place of every layer
that inherits from BatchNorm, also of timm's BatchNormAct2d: the activation in it is gone, and the trained network is not the
one that model.json describes.
"""

from __future__ import annotations

import logging

from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from src.errors import UserError
from src.user_command import corrected

log = logging.getLogger(__name__)

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncedBatchNorm(LayerSync):
    """While a network is trained, its BatchNorm layers compute as their synchronised variants; then as before.

    A layer keeps its object and changes its class, so that whatever it has (weights, statistics, activation, momentum, train
    or eval mode, hooks) stays and comes back. Raises UserError for a class that has no synchronised variant.
    """

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, type[nn.Module]]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        if not layers:
            log.warning("strategy.sync_batchnorm=true has no effect: the network has no BatchNorm layers.")
        variants = [_synchronised(type(layer)) for layer in layers]  # before any is changed
        self._before = [(layer, type(layer)) for layer in layers]
        for layer, variant in zip(layers, variants, strict=True):
            layer.__class__ = variant
            layer.process_group = None  # all processes
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for layer, before in self._before:
            layer.__class__ = before
            del layer.process_group
        self._before = []
        return model


def _synchronised(kind: type[nn.Module]) -> type[nn.Module]:
    if kind in _PLAIN:
        return nn.SyncBatchNorm
    if kind.__module__.startswith("timm."):
        from timm.layers import BatchNormAct2d, SyncBatchNormAct  # an extra

        if kind is BatchNormAct2d:
            return SyncBatchNormAct
    raise UserError(
        f"strategy.sync_batchnorm=true does not know how to synchronise the layers of class {kind.__name__}",
        where=f"{kind.__module__}.{kind.__qualname__}",
        why="the class does more than BatchNorm, and torch's SyncBatchNorm would drop it without a word",
        fix=corrected("strategy.sync_batchnorm=false", "freeze.batchnorm=keep"),
    )
