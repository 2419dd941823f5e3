"""The stage of a network that this process computes, for src/engine/pipeline/pipeline.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from src.engine.pipeline.stage import Stage, place, stages_of
from src.engine.steps.network import Network

Context = Callable[[], AbstractContextManager[None]]


class LocalStage:
    """This process's stage, and the schedules that take micro-batches through all stages. The stage's number is the rank.

    It moves the stage to the device. Every process calls the same methods, in the same order, with the same batches.

    micro_batches: how many a batch is divided into, one per image where it has fewer images. loss: of a micro-batch, from
    logits (B, outputs) and labels (B,) to what is added up over the micro-batches of a batch; called in the last stage.
    context: entered for the forward pass of each micro-batch.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        micro_batches: int,
        schedule: str,
        loss: Callable[[Tensor, Tensor], Tensor],
        context: Context,
    ) -> None:
        self.stages, self.rank, self.device = stages_of(network), dist.get_rank(), device
        self.micro_batches, self.schedule, self.loss, self.context = micro_batches, schedule, loss, context
        self.stage = self.stages[self.rank]
        self.is_last = self.rank == len(self.stages) - 1
        self.outputs = 0  # logits per image, known from the first batch on
        self._outline = stages_of(copy.deepcopy(network).to("meta").eval())  # computes shapes, without numbers
        self._schedules: dict[tuple[int, torch.Size, tuple[bool, ...]], Schedule1F1B | ScheduleGPipe] = {}
        place(network, [device if stage is self.stage else torch.device("cpu") for stage in self.stages])
        layout = torch.channels_last if network.channels_last else torch.contiguous_format
        self._module = _ContiguousStage(self.stage, layout, context)

    def forward_backward(self, images: Tensor, labels: Tensor) -> None:
        """Adds the gradients of the sum of the micro-batches' losses to the parameters. uint8 (B, 3, S, S), (B,)."""
        learning = tuple(any(parameter.requires_grad for parameter in stage.parameters()) for stage in self.stages)
        for start, stop, count in equal_runs(len(images), self.micro_batches):
            self._step(images[start:stop], count, learning, labels[start:stop] if self.is_last else None)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor | None:
        """uint8 (B, 3, S, S) -> logits (B, outputs) in the last stage; None in the others."""
        runs = equal_runs(len(images), self.micro_batches)
        outputs = [self._step(images[start:stop], count, (), None) for start, stop, count in runs]
        logits = [output for output in outputs if output is not None]
        return torch.cat(logits) if logits else None

    def _step(self, images: Tensor, count: int, learning: tuple[bool, ...], labels: Tensor | None) -> Tensor | None:
        schedule, inputs = self._schedule(images, count, learning), [images] if self.rank == 0 else []
        try:
            return schedule.step(*inputs, target=labels)
        except RuntimeError as error:
            # torch wraps an error of a stage: unwrapped, running out of memory is recognised.
            raise (error.__cause__ or error) from None

    def _schedule(self, images: Tensor, count: int, learning: tuple[bool, ...]) -> Schedule1F1B | ScheduleGPipe:
        """torch's schedule for `count` micro-batches of this shape. It is for fixed shapes, and knows from the start which
        gradients will be sent. learning: which stages do; () where there is no backward pass."""
        image = images[: len(images) // count]
        key = (count, image.shape, learning)
        if key not in self._schedules:
            between = self._between(image, learning)
            self.outputs = between[-1].shape[1]
            stage = PipelineStage(
                self._module,
                self.rank,
                len(self.stages),
                self.device,
                input_args=between[self.rank],
                output_args=between[self.rank + 1],
            )
            one_by_one = self.schedule == "1f1b" and learning and count >= len(self.stages)
            kind = Schedule1F1B if one_by_one else ScheduleGPipe
            self._schedules[key] = kind(stage, count, loss_fn=self.loss if learning else None, scale_grads=False)
        return self._schedules[key]

    def _between(self, images: Tensor, learning: tuple[bool, ...]) -> list[Tensor]:
        """The shapes and types of a micro-batch before the first stage and after each, as meta tensors."""
        with self.context():
            kind = self.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        x = torch.empty_like(images, device="meta")
        between = [x]
        for number, stage in enumerate(self._outline, 1):
            with torch.no_grad():
                x = stage(x)
            sends_gradients = any(learning[:number])
            between.append(torch.empty(x.shape, dtype=dtype or x.dtype, device="meta", requires_grad=sends_gradients))
        return between


class _ContiguousStage(nn.Module):
    """What is sent between processes must be contiguous; a stage computes in its own memory layout."""

    def __init__(self, stage: Stage, layout: torch.memory_format, context: Context) -> None:
        super().__init__()
        self.stage, self.layout, self.context = stage, layout, context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self.stage(x.contiguous(memory_format=self.layout)).contiguous()


def equal_runs(images: int, micro_batches: int) -> list[tuple[int, int, int]]:
    """The micro-batches of torch.tensor_split as one or two runs of equal ones: (first image, end, micro-batches)."""
    parts = min(images, micro_batches)
    size, larger = divmod(images, parts)
    middle = larger * (size + 1)
    runs = [(0, middle, larger), (middle, images, parts - larger)]
    return [run for run in runs if run[2] > 0]
