"""strategy.sync_batchnorm=true: BatchNorm statistics of the whole batch, over all processes of ddp. Made by src/trainer.py.

torch.nn.SyncBatchNorm.convert_sync_batchnorm, which Lightning uses, puts a plain SyncBatchNorm in the place of every layer
that inherits from BatchNorm, also of timm's BatchNormAct2d: the activation in it is gone, and the trained network is not the
one that model.json describes.
"""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import nn

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError
from src.engine.steps.step_snapshot import BATCHNORM

log = logging.getLogger(__name__)


class SyncedBatchNorm(LayerSync):
    """While a network is trained, its BatchNorm layers compute as their synchronised variants; afterwards as before.

    A layer keeps its object and changes its class: weights, statistics, activation, momentum, mode and hooks stay. Raises
    UserError for a class that has no synchronised variant.
    """

    def __init__(self) -> None:
        self._classes: list[tuple[Any, type[nn.Module]]] = []  # of the layers, before

    def apply(self, model: nn.Module) -> nn.Module:
        layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, BATCHNORM)]
        if not layers:
            log.warning("strategy.sync_batchnorm=true has no effect: the network has no BatchNorm layers.")
        variants = [_synchronised(type(layer)) for layer in layers]  # may raise: before any layer is changed
        self._classes = [(layer, type(layer)) for layer in layers]
        for layer, variant in zip(layers, variants, strict=True):
            layer.__class__ = variant
            layer.process_group = None  # all processes
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for layer, original in self._classes:
            layer.__class__ = original
            del layer.process_group
        self._classes = []
        return model


def _synchronised(original: type[nn.Module]) -> type[nn.Module]:
    if original in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.SyncBatchNorm
    if original.__module__.startswith("timm."):
        from timm.layers import BatchNormAct2d, SyncBatchNormAct  # an extra

        if original is BatchNormAct2d:
            return SyncBatchNormAct
    raise UserError(
        f"strategy.sync_batchnorm=true does not know how to synchronise the layers of class {original.__name__}",
        where=f"{original.__module__}.{original.__qualname__}",
        why="the class does more than BatchNorm, and torch's SyncBatchNorm would drop it without a word",
        fix=corrected("strategy.sync_batchnorm=false", "freeze.batchnorm=keep"),
    )
