"""What is trained in which epoch, and what stays as it was pretrained.

The trainable blocks are a function of the epoch, nothing else: the schedule is fixed before the first step, nothing about it
is stored, and a resumed run is in the right phase by itself. A frozen block takes no gradient and runs in eval mode, so
its BatchNorm statistics stay too. Why not Lightning's BackboneFinetuning: docs/freezing.md has a table of its defects.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Sequence

import lightning as L
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.config import Freeze
from src.errors import UserError
from src.models.backbones import blocks as blocks_of
from src.user_command import corrected

log = logging.getLogger(__name__)

Phases = dict[int, list[str]]  # epoch -> blocks trained from then on, besides those of earlier phases


def schedule(config: Freeze, blocks: Sequence[str], max_epochs: int, parameters: Sequence[str] = ()) -> Phases:
    """The phases of a config as names of modules of a TransferNetwork: head, backbone.layer4, ...

    blocks: of the backbone, from the input on, as src/models/backbones.blocks lists them; parameters: names of all of the
    backbone's parameters, for phases that name a part of a block. A phase may name head, all, last_8, a block (layer4 or
    backbone.layer4), a part of one (layer4.1) or a pattern (layer*). Raises UserError for any other name.
    """
    words = _preset(config, blocks) if config.phases is None else config.phases
    phases = {
        epoch: [
            name for word in words[epoch] for name in _resolve(str(word).removeprefix("backbone."), blocks, parameters)
        ]
        for epoch in sorted(words)
    }
    for warning in _oddities(phases, max_epochs):
        log.warning(f"Freezing: {warning}.")
    return phases


def _oddities(phases: Phases, max_epochs: int) -> list[str]:
    """Schedules that are valid and probably a mistake, one sentence each."""
    found = []
    late = [epoch for epoch in phases if epoch >= max_epochs]
    if late:
        found.append(
            f"the phase of epoch {min(late)} is never reached, since trainer.max_epochs={max_epochs}; "
            "set freeze.unfreeze_epoch or freeze.phases to unfreeze earlier"
        )
    head = min((epoch for epoch, names in phases.items() if "head" in names), default=max_epochs)
    if head >= max_epochs:
        found.append(
            "no phase that is reached trains the head, so its random weights stay as they are; name head in phase 0"
        )
    elif head > 0:
        found.append(f"the head is not trained before epoch {head}: until then the blocks learn for a random head")
    for epoch, names in phases.items():
        before = trainable(phases, epoch - 1)
        if all(_inside(name, before) for name in names):
            found.append(f"the phase of epoch {epoch} changes nothing: all that it names is trained already")
    return found


def _preset(config: Freeze, blocks: Sequence[str]) -> Phases:
    """head_only; full; last_n: the head, then the last n blocks with it; gradual: those blocks one epoch after another."""
    if config.preset == "full":
        return {0: ["all"]}
    phases, start = {0: ["head"]}, config.unfreeze_epoch
    if config.preset == "last_n":
        phases.setdefault(start, []).append(f"last_{config.last_n}")
    if config.preset == "gradual":
        for epoch, block in enumerate(reversed(blocks[-config.last_n :]), start):
            phases.setdefault(epoch, []).append(block)
    return phases


def _resolve(word: str, blocks: Sequence[str], parameters: Sequence[str]) -> list[str]:
    if word == "head":
        return ["head"]
    if word == "all":
        return ["head", *(f"backbone.{block}" for block in blocks)]
    if last := re.fullmatch(r"last_([1-9]\d*)", word):
        return [f"backbone.{block}" for block in blocks[-int(last[1]) :]]
    found = fnmatch.filter(blocks, word) or [word] * any(name.startswith(word + ".") for name in parameters)
    if not found:
        raise UserError(
            f"freeze.phases names {word!r}, which is no block of the backbone",
            why=f"blocks, from the input on: {', '.join(blocks)}; also head, all, last_N, and patterns such as layer*",
            fix=corrected(f"freeze.phases={{0:[head],2:[{blocks[-1]}]}}"),
        )
    return [f"backbone.{block}" for block in found]


def _inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or a parameter is one of the modules or in one of them."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def trainable(phases: Phases, epoch: int) -> list[str]:
    """The modules that learn in an epoch, in the order in which they began to."""
    return list(dict.fromkeys(name for start, names in phases.items() if start <= epoch for name in names))


def described(network: nn.Module, phases: Phases, max_epochs: int) -> str:
    """What is trained from which epoch of a TransferNetwork: 'epoch 0 (the first): head; from epoch 1: head and 94 % of the
    backbone (12 of 17 blocks)'. The share is that of the backbone's parameters."""
    told = []
    for epoch in [epoch for epoch in phases if epoch < max_epochs]:
        text = _described(network, trainable(phases, epoch))
        if not told or not told[-1].endswith(f": {text}"):
            when = f"from epoch {epoch}" if epoch else "epoch 0 (the first)"
            told.append(f"{when}: {text}")
    return "; ".join(told if len(told) <= 4 else [*told[:2], "...", told[-1]])


def _described(network: nn.Module, names: Sequence[str]) -> str:
    sizes = {f"backbone.{name}": p.numel() for name, p in network.backbone.named_parameters()}
    trained = sum(size for name, size in sizes.items() if _inside(name, names))
    if not trained:
        return "head"
    blocks = [f"backbone.{block}" for block in blocks_of(network.backbone)]
    whole = sum(_inside(block, names) for block in blocks)
    percent = 100 * trained / sum(sizes.values())
    if whole == len(blocks):
        text = f"100 % of the backbone (all {whole} blocks)"
    else:
        share = f"{min(percent, 99):.0f}" if percent >= 1 else f"{percent:.1g}"
        text = f"{share} % of the backbone ({whole} of {len(blocks)} blocks)"
    return f"head and {text}" if "head" in names else text


def apply(network: nn.Module, phases: Phases, epoch: int, batchnorm: str) -> bool:
    """Puts a TransferNetwork into the state of an epoch; returns whether any parameter was frozen or unfrozen.

    What learns is in train mode, the rest in eval mode. A layer without weights, such as dropout, learns with the block it
    is in, or else with the layer before it: what leaves a frozen prefix never changes. Dropout behind the backbone's last
    layer belonged to the classifier that was removed and stays off: before the head, model.dropout decides.
    batchnorm='keep' leaves the BatchNorm layers of the backbone in eval mode even where their weights learn, so that a
    image's result does not depend on its batch.
    """
    names = trainable(phases, epoch)

    def learns(name: str) -> bool:
        return _inside(name, names)

    changed = False
    for name, parameter in network.named_parameters():
        changed |= parameter.requires_grad != learns(name)
        parameter.requires_grad_(learns(name))
    last = [layer for layer in network.backbone.modules() if _own_weights(layer)][-1]
    before = False  # whether the layer before learns
    for name, layer in network.named_modules():
        if own := _own_weights(layer):
            before = own[0].requires_grad and layer is not last
        inside = [parameter.requires_grad for parameter in layer.parameters()]
        keep = (
            batchnorm == "keep" and name.startswith("backbone.") and isinstance(layer, nn.modules.batchnorm._BatchNorm)
        )
        layer.training = (learns(name) or (any(inside) if inside else before)) and not keep
    return changed


def _own_weights(layer: nn.Module) -> list[nn.Parameter]:
    return list(layer.parameters(recurse=False))


class FreezingSchedule(L.Callback):
    """Applies the schedule at the start of every epoch, and when training starts in the middle of one.

    momentum: of the backbone's BatchNorm. Weights that were trained for weeks come with 0.01 (TensorFlow's) or less; a
    fine-tuning of a few hundred steps would end with statistics of neither the old images nor the new.
    """

    def __init__(self, phases: Phases, batchnorm: str, momentum: float = 0.1) -> None:
        self.phases, self.batchnorm, self.momentum = phases, batchnorm, momentum

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        layers = [m for m in pl_module.network.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for layer in layers:
            layer.momentum = self.momentum
        if self.batchnorm == "keep" and not layers and trainer.is_global_zero:
            log.warning("freeze.batchnorm=keep has no effect: the backbone has no BatchNorm layers.")
        apply(pl_module.network, self.phases, trainer.current_epoch, self.batchnorm)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply(trainer, pl_module)

    def _apply(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not apply(pl_module.network, self.phases, trainer.current_epoch, self.batchnorm):
            return
        if trainer.is_global_zero:
            names = [name.removeprefix("backbone.") for name in trainable(self.phases, trainer.current_epoch)]
            log.info(f"from here on these learn: {_shorten(names)}")
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            _wrap_again(trainer, pl_module)
        if pl_module.device.type == "cuda":
            # Other activations are kept from here on: cached memory in pieces of the old sizes would only be in the way.
            torch.cuda.empty_cache()


def _wrap_again(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """A new DistributedDataParallel, which looks once, when it is made, at which parameters need their gradients averaged:
    those unfrozen later would go their own way on every rank (Lightning issue 20340)."""
    trainer.strategy.model = pl_module  # the old wrapper goes first, and its hooks on the parameters with it
    trainer.strategy.configure_ddp()


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, ..., {names[-1]}"
