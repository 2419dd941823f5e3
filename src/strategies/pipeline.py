"""strategy=pipeline: a split network with a process for each stage, on one machine or several.

A batch goes through the stages in micro-batches, several of which are under way at once: while the second stage has the
first of them, the first stage has the second. torch.distributed.pipelining does the sending and keeps the order:

- gpipe (Huang et al., 2019, https://arxiv.org/abs/1811.06965): all forward passes, then all backward passes.
- 1f1b (Narayanan et al., 2019, https://arxiv.org/abs/1806.03377): as soon as the last stage has a loss, one backward pass
  after each forward pass, so that a stage keeps the activations of no more micro-batches than there are stages.

Both give the gradients of the unsplit network fed the same micro-batches, to the bit. All processes have the whole
network, but compute with their own stage only: the weights of the others stay on the CPU as they were and grow stale.
They are put together where all are needed: in checkpoints, and at the end of training in the first process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.optim import Optimizer

from src.models.model_parallel_resnet50 import Stage
from src.models.network import TransferNetwork
from src.strategies.own_backward import OwnBackward

Schedule = Schedule1F1B | ScheduleGPipe


class Pipeline(OwnBackward, DDPStrategy):
    """To be used with the precision of src/strategies/pipeline_precision.py. The rank of a process is that of its stage.

    Every process is given the same batches. Only the first needs the images (run.py gives black ones to the others, which
    cost nothing to read). Loss, predicted classes and logits go from the last stage to all others, so that all compute the
    same metrics and decide alike.

    micro_batches: how many a batch is divided into; one with fewer images has one for each. schedule: 1f1b or gpipe;
    1f1b takes no fewer micro-batches than stages, below that it is gpipe. timeout_seconds: for which a process waits for
    the others, where the process group is not there already.
    """

    shares_batches = False  # all processes work on the same batch: src/data/module.py asks

    def __init__(self, micro_batches: int, schedule: str, timeout_seconds: float) -> None:
        self.timeout = timedelta(seconds=timeout_seconds)
        super().__init__(cluster_environment=TorchElasticEnvironment(), timeout=self.timeout)
        self.micro_batches, self.schedule = micro_batches, schedule
        self._own: OwnStage
        self._shares: list[Any] = []  # of each micro-batch in the loss of the batch
        self._compared: list[tuple[Tensor, Tensor]] = []  # its part of that loss, and its predicted classes

    @property
    def _last(self) -> int:
        return self.world_size - 1

    def model_to_device(self) -> None:
        """Only the own stage, and what is not part of the network."""
        module = self.lightning_module
        network: TransferNetwork = module.network
        self._own = OwnStage(
            network,
            self.global_rank,
            self.root_device,
            self.micro_batches,
            self.schedule,
            self._loss,
            self.precision_plugin.forward_context,
        )
        assert len(self._own.stages) == self.world_size
        for child in module.children():
            if child is not network:
                child.to(self.root_device)
        _update_properties(module, self.root_device)  # what module.to() does besides

    def configure_ddp(self) -> None:
        """No wrapper: the processes have no parameter in common. Validation calls the module."""
        self.lightning_module.forward = self._logits

    def teardown(self) -> None:
        if self.lightning_module is not None:  # an error may come before there is one
            vars(self.lightning_module).pop("forward", None)
        super().teardown()

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        parts = min(self.micro_batches, len(labels))
        batches = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        weights = [self.lightning_module.loss_weight(batch) for batch in batches]
        self._shares, self._compared = [weight / sum(weights) for weight in weights], []
        self._own.forward_backward(images, labels)
        if self.global_rank == self._last:
            losses, predicted = zip(*self._compared, strict=True)
            result = torch.cat([sum(losses)[None], *predicted])  # classes are small enough for a float
        else:
            result = torch.zeros(1 + len(labels), device=self.root_device)
        if (
            getattr(self.precision_plugin, "scaler", None) is None
        ):  # which expects gradients of inf, and agrees by itself
            gradients = [p.grad for p in self._own.stage.parameters() if p.grad is not None]
            result[0] += 0 * torch.nn.utils.get_total_norm(gradients)  # nan where a stage's gradients are not finite
        dist.all_reduce(result)  # of the last stage and zeros
        return result[0], result[1:].long()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of a micro-batch, as it goes into the backward pass. Called in the last stage, in the order of micro-batches."""
        with self.precision_plugin.forward_context():
            loss, predicted = self.lightning_module.compare(logits, labels)
        loss = loss * self._shares[len(self._compared)]
        self._compared.append((loss.detach(), predicted))
        return self.scaled(loss)

    def _logits(self, images: Tensor) -> Tensor:
        """The module's forward, for validation: uint8 (B, 3, S, S) -> logits (B, outputs) in every process."""
        logits = self._own.forward(images)
        if logits is None:
            logits = torch.empty(len(images), self._own.outputs, device=self.root_device)
        logits = logits.float()
        dist.broadcast(logits, self._last)
        return logits

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Called by all; whole in the first process, which saves it."""
        state = super().lightning_module_state_dict()
        own = {id(tensor) for tensor in self._own.stage.state_dict(keep_vars=True).values()}
        names = [name for name, tensor in self.lightning_module.state_dict(keep_vars=True).items() if id(tensor) in own]
        for stage in self._gathered({name: state[name] for name in names}):
            state.update(stage)
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Called by all; whole in the first process. A process has states of the parameters of its own stage only."""
        state = super().optimizer_state(optimizer)
        for stage in self._gathered(state["state"]):
            state["state"].update(stage)
        state["state"] = dict(sorted(state["state"].items()))
        return state

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        own = {id(parameter) for parameter in self._own.stage.parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            kept = {index: values for index, values in state["state"].items() if id(parameters[index]) in own}
            optimizer.load_state_dict(state | {"state": kept})

    def on_train_end(self) -> None:
        """The first process goes on alone with the network, to measure and to save it."""
        state = self.lightning_module_state_dict()
        if self.is_global_zero:
            self.lightning_module.load_state_dict(state)

    def _gathered(self, own: dict[Any, Any]) -> list[dict[Any, Any]]:
        """Those of the other processes, in the first: dicts of tensors, or of dicts of tensors, which come to its CPU. The
        tensors are sent one by one, since a GPU may have no room for a copy of all. In the other processes nothing."""
        outline = apply_to_collection(own, Tensor, lambda tensor: tensor.to("meta"))
        outlines = [None] * self.world_size if self.is_global_zero else None
        dist.gather_object(outline, outlines)
        if outlines is None:
            apply_to_collection(own, Tensor, lambda tensor: dist.send(tensor.to(self.root_device).contiguous(), 0))
            return []
        return [
            apply_to_collection(outline, Tensor, partial(self._received, rank))
            for rank, outline in enumerate(outlines)
            if rank != 0
        ]

    def _received(self, rank: int, outline: Tensor) -> Tensor:
        tensor = torch.empty(outline.shape, dtype=outline.dtype, device=self.root_device)
        dist.recv(tensor, rank)
        return torch.empty_like(outline, device="cpu").copy_(tensor)  # in the memory layout that it had


class OwnStage:
    """The stage of a network that this process computes, and the schedules that take micro-batches through all stages.

    It moves the stage to the device. Every process calls the same methods, in the same order, with the same batches.

    loss: of a micro-batch, from logits (B, outputs) and labels (B,) to what is added up over the micro-batches of a batch;
    called in the last stage. context: entered for the forward pass of each micro-batch.
    """

    def __init__(
        self,
        network: TransferNetwork,
        rank: int,
        device: torch.device,
        micro_batches: int,
        schedule: str,
        loss: Callable[[Tensor, Tensor], Tensor],
        context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.stages, self.rank, self.device = network.stages(), rank, device
        self.micro_batches, self.schedule, self.loss, self.context = micro_batches, schedule, loss, context
        self.outputs = 0  # logits of an image; known from the first batch on
        self._outline = copy.deepcopy(network).to("meta").eval().stages()  # tells shapes, without numbers
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        network.place([device if stage is self.stage else torch.device("cpu") for stage in self.stages])
        layout = torch.channels_last if network.channels_last else torch.contiguous_format
        self._module = _Sent(self.stage, layout, context)

    @property
    def stage(self) -> Stage:
        return self.stages[self.rank]

    @property
    def _is_last(self) -> bool:
        return self.rank == len(self.stages) - 1

    def forward_backward(self, images: Tensor, labels: Tensor) -> None:
        """Adds the gradients of the sum of the micro-batches' losses to the parameters. uint8 (B, 3, S, S), (B,)."""
        learning = tuple(any(parameter.requires_grad for parameter in stage.parameters()) for stage in self.stages)
        for start, stop, count in equal_runs(len(images), self.micro_batches):
            target = {"target": labels[start:stop]} if self._is_last else {}
            self._step(images[start:stop], count, learning, **target)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor | None:
        """uint8 (B, 3, S, S) -> logits (B, outputs) in the last stage; None in the others."""
        runs = equal_runs(len(images), self.micro_batches)
        logits = [self._step(images[start:stop], count, ()) for start, stop, count in runs]
        return torch.cat(logits) if self._is_last else None

    def _step(self, images: Tensor, count: int, learning: tuple[bool, ...], **target: Tensor) -> Tensor | None:
        schedule = self._schedule(images, count, learning)
        try:
            return schedule.step(*([images] if self.rank == 0 else []), **target)
        except RuntimeError as error:
            # torch raises another in the place of an error in a stage: nobody would know that memory ran out.
            raise (error.__cause__ or error) from None

    def _schedule(self, images: Tensor, count: int, learning: tuple[bool, ...]) -> Schedule:
        """For so many micro-batches of this shape. learning: which stages do; () where there is no backward pass.

        torch's schedules are for fixed shapes, and know from the start which gradients will be sent.
        """
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
        """What a micro-batch is before the first stage and after each, as tensors without numbers."""
        with self.context():
            kind = self.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        x = torch.empty_like(images, device="meta")
        between = [x]
        with torch.no_grad():
            for number, stage in enumerate(self._outline, 1):
                x = stage(x)
                between.append(
                    torch.empty(x.shape, dtype=dtype or x.dtype, device="meta", requires_grad=any(learning[:number]))
                )
        return between


class _Sent(nn.Module):
    """A stage between two others: what is sent between processes must be contiguous, whatever its memory layout is."""

    def __init__(
        self, stage: Stage, layout: torch.memory_format, context: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__()
        self.stage, self.layout, self.context = stage, layout, context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self.stage(x.contiguous(memory_format=self.layout)).contiguous()


def equal_runs(images: int, micro_batches: int) -> list[tuple[int, int, int]]:
    """The micro-batches of torch.tensor_split, in one or two runs of equal ones: from which image to which, and how many
    micro-batches these are."""
    parts = min(images, micro_batches)
    size, larger = divmod(images, parts)
    middle = larger * (size + 1)
    runs = [(0, middle, larger), (middle, images, parts - larger)]
    return [run for run in runs if run[2] > 0]
