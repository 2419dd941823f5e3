"""A ResNet50 cut into stages, which can lie on different devices: model parallelism by hand, as in the lecture.

The layers and their names are torchvision's, so pretrained weights load, and a network trained in stages is a plain
ResNet50 afterwards. src/engine/pipeline/model_parallel.py places the stages on devices in one process,
src/engine/pipeline/pipeline.py has one process per stage; both keep several micro-batches under way at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from src.engine.commands.user_command import corrected
from src.engine.pipeline.stage import Stage
from src.engine.runs.errors import UserError

# The layers in the order of the forward pass.
UNITS = (
    *("conv1", "bn1", "relu", "maxpool"),
    *(f"layer{layer}.{block}" for layer, blocks in enumerate((3, 4, 6, 3), 1) for block in range(blocks)),
    *("avgpool", "fc"),
)
BLOCKS = UNITS[3:-3]  # cuts after all of these give the smallest stages that have weights
CUTS = (*BLOCKS, "layer1", "layer2", "layer3")  # the layers after which it can be cut


class ModelParallelResNet50(ResNet):
    """torchvision's resnet50 in stages: float images (B, 3, H, W) on any device -> logits (B, num_classes) on the last.

    split_at: the layers after which it is cut, such as ["layer2"] or ["layer1", "layer3.2"]: one more stage than cuts.
    devices: one per stage; None: all on the CPU.
    Raises UserError for a layer that does not exist, cuts out of order, and another number of devices than stages.
    """

    finest_cuts = BLOCKS

    def __init__(
        self,
        num_classes: int = 1000,
        devices: Sequence[str | torch.device] | None = None,
        split_at: Sequence[str] = ("layer2",),
    ) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=num_classes)
        self.split(split_at)
        if devices is not None:
            self.place(devices)

    def split(self, split_at: Sequence[str]) -> None:
        """Cuts after other layers; the layers stay on their devices. Raises UserError."""
        self._bounds, self.split_at = stage_bounds(split_at), tuple(split_at)

    def stage_layers(self) -> list[list[nn.Module]]:
        """The layers of each stage. layer1 to layer4 are not called as such, so forward hooks belong on their blocks."""
        return [self._layers(start, stop) for start, stop in pairwise(self._bounds)]

    def _layers(self, start: int, stop: int) -> list[nn.Module]:
        layers = [self.get_submodule(name) for name in UNITS[start:stop]]
        return layers if stop < len(UNITS) else [*layers[:-1], nn.Flatten(1), layers[-1]]

    def stages(self) -> list[Stage]:
        """Modules that share these layers; called one after another they are the network."""
        return [Stage(layers) for layers in self.stage_layers()]

    def place(self, devices: Sequence[str | torch.device]) -> None:
        """Moves each stage to its device. Raises UserError for another number of devices than stages."""
        self.check_devices(len(devices))
        for stage, device in zip(self.stages(), devices, strict=True):
            stage.place(torch.device(device))

    def check_devices(self, count: int) -> None:
        """Raises UserError unless there is a device for every stage, and a stage for every device."""
        stages, cuts = len(self._bounds) - 1, ",".join(self.split_at)
        if count != stages:
            raise UserError(
                f"{stages} stages do not fit {count} {'device' if count == 1 else 'devices'}",
                where=f"model.split_at=[{cuts}], trainer.devices={count}",
                why="every stage has a device of its own, and there is one stage more than cuts",
                fix=[
                    corrected(f"trainer.devices={stages}"),
                    corrected("model.split_at=auto", f"trainer.devices={max(2, count)}"),
                ],
            )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages():
            x = stage(x.to(stage.device))
        return x


def stage_bounds(split_at: Sequence[str]) -> list[int]:
    """Where each stage begins in UNITS, and the end. Raises UserError."""
    cuts = ",".join(split_at)
    unknown = [name for name in split_at if name not in CUTS]
    if unknown:
        raise UserError(
            f"a ResNet50 cannot be split after {unknown[0]!r}",
            where=f"model.split_at=[{cuts}]",
            why=f"it can be split after: {', '.join(CUTS)}",
            fix=corrected("model.split_at=[layer2]", "trainer.devices=2"),
        )
    last_units = [max(unit for unit in UNITS if unit == name or unit.startswith(f"{name}.")) for name in split_at]
    bounds = [0, *(UNITS.index(unit) + 1 for unit in last_units), len(UNITS)]
    if bounds != sorted(set(bounds)):
        raise UserError(
            f"model.split_at=[{cuts}] is not in the order of the layers",
            why="each cut comes after the one before it, and a stage has at least one layer with weights",
            fix=corrected("model.split_at=[layer1,layer3]", "trainer.devices=3"),
        )
    return bounds
