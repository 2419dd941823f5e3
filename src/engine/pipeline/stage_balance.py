"""model.split_at=auto and auto_memory: measures where to cut a ResNet50 so that its stages are alike.

A step takes as long as its slowest stage, and its largest stage decides whether it fits. Real micro-batches go through a copy
of the network, block by block: weights, BatchNorm statistics and the random state of the network do not change.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected
from src.engine.memory.memory import make_states
from src.engine.pipeline.stage import Stage, place, stages_of
from src.engine.pipeline.stage_threads import warmup
from src.engine.runs import seeding
from src.engine.runs.errors import UserError
from src.engine.runs.job import Job
from src.engine.runs.task import RunTask
from src.engine.steps.precision import autocast

log = logging.getLogger(__name__)

TIMED, TIMED_SECONDS = 5, 0.3  # passes through a block after a first one; whichever is reached first ends its timing


class Measured(NamedTuple):
    """A block of the network."""

    seconds: float  # forward and backward pass of a micro-batch; only forward where it and all before it are frozen
    fixed: int  # bytes of weights, gradients and optimizer states
    activations: int  # bytes that a micro-batch needs from its forward to its backward pass


def settle_split(job: Job, task: RunTask) -> None:
    """Cuts the network after the layers that `choose_split` finds, in all processes of the run. Raises UserError."""
    backbone: Any = task.network.backbone
    backbone.split(job.ranks.told_by_first(lambda: choose_split(job.config, task, job.device, job.num_devices)))


def choose_split(config: Config, task: RunTask, device: torch.device, stages: int) -> list[str]:
    """The layers to cut after, for ModelParallelResNet50.split. Prints them with the share of every stage.

    Among all cuts, the one whose slowest stage is quickest (model.split_at=auto), or whose largest stage is smallest
    (auto_memory). device: on which all blocks are measured. Raises UserError for more stages than there are blocks.
    """
    backbone: Any = task.network.backbone
    finest: Sequence[str] = backbone.finest_cuts
    if stages > len(finest) + 1:
        raise UserError(
            f"a ResNet50 cannot be cut into {stages} stages",
            where=f"model.split_at={config.model.split_at} makes a stage for every device",
            why=f"it has {len(finest) + 1} parts: the first layers, and blocks that are not cut any further",
            fix=corrected(f"trainer.devices={len(finest) + 1}"),
        )
    blocks = measure(config, task, device)
    if config.model.split_at == "auto":
        costs = [[block.seconds for block in blocks] for _ in range(stages)]
    else:
        kept = [warmup(config.strategy.schedule, stages, i, config.strategy.micro_batches) for i in range(stages)]
        costs = [[block.fixed + count * block.activations for block in blocks] for count in kept]
    cuts = best_cuts(costs)
    split_at = [finest[cut - 1] for cut in cuts]
    parts = stage_costs(costs, cuts)
    shares = ", ".join(f"{100 * part / sum(parts):.0f} %" for part in parts)
    what = "time" if config.model.split_at == "auto" else "memory"
    log.info(f"model.split_at={config.model.split_at}: [{','.join(split_at)}]; the stages have {shares} of the {what}")
    return split_at


def best_cuts(costs: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The first block of every stage but the first: the most expensive stage is as cheap as possible, then the next most
    expensive, and so on. costs: [stage][block]. All cuts are tried: with 17 blocks there are at most 12,870.
    """
    blocks = range(1, len(costs[0]))
    return min(combinations(blocks, len(costs) - 1), key=lambda cuts: sorted(stage_costs(costs, cuts), reverse=True))


def stage_costs(costs: Sequence[Sequence[float]], cuts: Sequence[int]) -> list[float]:
    """The cost of each stage, with cuts before these blocks."""
    bounds = pairwise([0, *cuts, len(costs[0])])
    return [sum(row[start:stop]) for row, (start, stop) in zip(costs, bounds, strict=True)]


def measure(config: Config, task: RunTask, device: torch.device) -> list[Measured]:
    """Every block of a copy of the network in the phase that trains most, with a micro-batch of random images as large as the
    run's."""
    network, image_size = copy.deepcopy(task.network), task.preprocessing.image_size
    task.freezing.apply_last(network)
    backbone: Any = network.backbone
    backbone.split(backbone.finest_cuts)
    blocks = stages_of(network)
    place(network, [device] * len(blocks))
    optimizer = task.optimizer(config, network)
    make_states(optimizer)

    size = -(-config.data.batch_size // config.strategy.micro_batches)
    generator = seeding.generator("stage balance")
    x = torch.randint(256, (size, 3, image_size, image_size), generator=generator, dtype=torch.uint8).to(device)
    measured = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
        for block in blocks:
            fixed = _fixed_bytes(block, optimizer)
            with autocast(config.precision.name, device):
                y, activations = _forward(block, x)
            measured.append(Measured(_seconds(block, x, config.precision.name), fixed, activations))
            x = y.detach().requires_grad_(y.requires_grad)
    return measured


def _fixed_bytes(block: Stage, optimizer: Optimizer) -> int:
    tensors = [*block.parameters(), *block.buffers()]
    for parameter in block.parameters():
        if parameter.grad is not None:
            tensors += [parameter.grad, *optimizer.state[parameter].values()]
    return sum(tensor.nbytes for tensor in tensors)


def _forward(block: Stage, x: Tensor) -> tuple[Tensor, int]:
    """The block's output, and the bytes it keeps for the backward pass; its input counts where it was made."""
    elsewhere = {tensor.untyped_storage().data_ptr() for tensor in (x, *block.parameters(), *block.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in elsewhere:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = block(x)
    return y, sum(kept.values())


def _seconds(block: Stage, x: Tensor, precision: str) -> float:
    """The median of a few passes."""

    def once() -> float:
        start = time.perf_counter()
        with autocast(precision, x.device):
            y = block(x)
        if y.requires_grad:
            y.backward(torch.ones_like(y))
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - start

    once()  # libraries look for the kernel that suits a size when they first see it
    seconds = [once()]
    while len(seconds) < TIMED and sum(seconds) < TIMED_SECONDS:
        seconds.append(once())
    return statistics.median(seconds)
