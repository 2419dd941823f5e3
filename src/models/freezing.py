"""Which parts of the network learn in which epoch: decided before the first step, a function of the epoch alone.

Nothing about it is stored, so a resumed run is in the right phase by itself. A frozen block takes no gradient and runs in
eval mode, so its BatchNorm statistics stay too. src/callbacks/freezing.py applies the plan while Lightning trains.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from src.config import Freeze
from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError
from src.engine.steps.network import Network
from src.engine.steps.step_snapshot import BATCHNORM
from src.engine.weights.low_rank import LowRank, is_adapter
from src.models.backbones import blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FreezePlan:
    """phases: epoch, counted from 0 -> modules of the network (head, backbone.layer4) that learn from then on.
    batchnorm: 'keep' or 'update', see `apply`."""

    phases: dict[int, list[str]]
    max_epochs: int
    batchnorm: str = "update"

    @classmethod
    def of(cls, config: Freeze, backbone: nn.Module, max_epochs: int) -> FreezePlan:
        """The plan of a config. A phase may name head, all, last_8, a block (layer4 or backbone.layer4), a part of a block
        (layer4.1) or a pattern (layer*); UserError for any other name. Warns of a plan that is probably a mistake."""
        words = _preset(config, blocks(backbone)) if config.phases is None else config.phases
        phases = {
            epoch: [name for word in words[epoch] for name in _resolve(word, backbone)] for epoch in sorted(words)
        }
        plan = cls(phases, max_epochs, config.batchnorm)
        for warning in plan._warnings():
            log.warning(f"Freezing: {warning}.")
        return plan

    def trainable(self, epoch: int) -> list[str]:
        """The modules that learn in an epoch, in the order in which they were unfrozen."""
        return list(dict.fromkeys(name for start, names in self.phases.items() if start <= epoch for name in names))

    def backbone_is_frozen(self, epoch: int) -> bool:
        """Whether it still is as it was loaded in that epoch."""
        return all(name == "head" for name in self.trainable(epoch))

    def apply(self, network: Network, epoch: int) -> bool:
        """Puts the network into the state of an epoch; returns whether any parameter was frozen or unfrozen.

        What learns is in train mode, the rest in eval mode. A layer without parameters, such as dropout, follows the block
        it is in, or else the layer before it, so that a frozen prefix is deterministic. Dropout behind the backbone's last
        layer belonged to the removed classifier and stays off: before the head, model.dropout decides. batchnorm='keep'
        leaves the backbone's BatchNorm layers in eval mode even where their weights learn, so that an image's result does
        not depend on its batch.
        """
        names = self.trainable(epoch)
        changed = False
        for name, parameter in network.named_parameters():
            learns = _inside(name, names)
            changed |= parameter.requires_grad != learns
            parameter.requires_grad_(learns)
        last = [layer for layer in network.backbone.modules() if _own_parameters(layer)][-1]
        previous_learns = False
        for name, layer in network.named_modules():
            if own := _own_parameters(layer):
                previous_learns = own[0].requires_grad and layer is not last
            nested = [parameter.requires_grad for inner in layer.modules() for parameter in _own_parameters(inner)]
            learns = _inside(name, names) or (any(nested) if nested else previous_learns)
            kept = self.batchnorm == "keep" and name.startswith("backbone.") and isinstance(layer, BATCHNORM)
            layer.training = learns and not kept
        return changed

    def apply_last(self, network: Network) -> bool:
        """The state of the last epoch, in which most is trained: what memory and stages are measured for."""
        return self.apply(network, self.max_epochs - 1)

    def described(self, network: Network) -> str:
        """'epoch 0 (the first): head; from epoch 1: head and 94 % of the backbone (12 of 17 blocks)', where the percentage
        is of the backbone's parameters."""
        texts: list[str] = []
        for epoch in [epoch for epoch in self.phases if epoch < self.max_epochs]:
            text = _share(network, self.trainable(epoch))
            if not texts or not texts[-1].endswith(f": {text}"):
                texts.append(f"{f'from epoch {epoch}' if epoch else 'epoch 0 (the first)'}: {text}")
        return "; ".join(texts if len(texts) <= 4 else [*texts[:2], "...", texts[-1]])

    def _warnings(self) -> list[str]:
        """A sentence for each oddity of a plan that is valid but probably not meant."""
        warnings = []
        late = [epoch for epoch in self.phases if epoch >= self.max_epochs]
        if late:
            warnings.append(
                f"the phase of epoch {min(late)} is never reached, since trainer.max_epochs={self.max_epochs}; "
                "set freeze.unfreeze_epoch or freeze.phases to unfreeze earlier"
            )
        head = min((epoch for epoch, names in self.phases.items() if "head" in names), default=self.max_epochs)
        if head >= self.max_epochs:
            warnings.append(
                "no phase that is reached trains the head, so its random weights stay as they are; name head in phase 0"
            )
        elif head > 0:
            warnings.append(
                f"the head is not trained before epoch {head}: until then the blocks learn for a random head"
            )
        for epoch, names in self.phases.items():
            if all(_inside(name, self.trainable(epoch - 1)) for name in names):
                warnings.append(f"the phase of epoch {epoch} changes nothing: all that it names is trained already")
        return warnings


def _preset(config: Freeze, names: Sequence[str]) -> dict[int, list[str]]:
    """head_only; full; last_n: the head, then the last n blocks with it; gradual: those blocks one epoch after another."""
    if config.preset == "full" or config.lora_rank:
        return {0: ["head", "lora"] if config.lora_rank else ["all"]}
    phases, start = {0: ["head"]}, config.unfreeze_epoch
    if config.preset == "last_n":
        phases.setdefault(start, []).append(f"last_{config.last_n}")
    if config.preset == "gradual":
        for epoch, block in enumerate(reversed(names[-config.last_n :]), start):
            phases.setdefault(epoch, []).append(block)
    return phases


def _resolve(word: object, backbone: nn.Module) -> list[str]:
    """The modules that a word of a phase names."""
    word, names = str(word).removeprefix("backbone."), blocks(backbone)
    if word in ("head", "lora"):
        return [word]
    if word == "all":
        return ["head", *(f"backbone.{block}" for block in names)]
    if last := re.fullmatch(r"last_([1-9]\d*)", word):
        return [f"backbone.{block}" for block in names[-int(last[1]) :]]
    matches = fnmatch.filter(names, word)
    if not matches and any(name.startswith(word + ".") for name, _ in backbone.named_parameters()):
        matches = [word]  # a part of a block
    if not matches:
        raise UserError(
            f"freeze.phases names {word!r}, which is no block of the backbone",
            why=f"blocks, from the input on: {', '.join(names)}; also head, all, last_N, and patterns such as layer*",
            fix=corrected(f"freeze.phases={{0:[head],2:[{names[-1]}]}}"),
        )
    return [f"backbone.{block}" for block in matches]


def _inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or parameter is one of the modules, or lies in one of them. lora: all adapters."""
    learns = is_adapter(name) and "lora" in modules
    return learns or any(name == module or name.startswith(module + ".") for module in modules)


def _own_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [] if isinstance(layer, LowRank) else list(layer.parameters(recurse=False))


def _share(network: Network, modules: Sequence[str]) -> str:
    """'head and 94 % of the backbone (12 of 17 blocks)'."""
    sizes = {f"backbone.{name}": parameter.numel() for name, parameter in network.backbone.named_parameters()}
    trained = sum(size for name, size in sizes.items() if _inside(name, modules))
    if not trained:
        return "head"
    names = [f"backbone.{block}" for block in blocks(network.backbone)]
    whole = sum(_inside(name, modules) for name in names)
    if whole == len(names):
        text = f"100 % of the backbone (all {whole} blocks)"
    else:
        percent = 100 * trained / sum(sizes.values())
        share = f"{min(percent, 99):.0f}" if percent >= 1 else f"{percent:.1g}"
        text = f"{share} % of the backbone ({whole} of {len(names)} blocks)"
    text = f"adapters, {text}" if "lora" in modules else text
    return f"head and {text}" if "head" in modules else text
