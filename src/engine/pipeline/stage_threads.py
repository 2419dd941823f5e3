"""A batch in micro-batches through the stages of a network, each stage in a thread of its own, so that they overlap.

model_parallel.py uses it. A stage works through a list of operations, `forward` or `backward` of a micro-batch. The output
of a stage is detached; the next stage computes on it as on a leaf and hands its gradient back. So every stage has a graph
of its own per micro-batch, and backward passes never meet.

Forward as well as backward passes come in the order of the micro-batches in every stage. Gradients are therefore added
up, BatchNorm statistics updated and dropout drawn (only the head, in the last stage, has any) as if the same micro-batches
went one after another through the whole network: the result is the same to the bit.

On CPUs the threads compute at the same time because kernels release Python's lock. GPUs need nothing else: a thread only
queues kernels, each device has a stream of its own, and a copy between devices waits in both of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from queue import SimpleQueue

from torch import Tensor

from src.engine.pipeline.stage import Stage

Operation = tuple[str, int]  # "forward" or "backward", and the number of the micro-batch
LossOf = Callable[[int, Tensor], Tensor]  # micro-batch, output of the last stage -> what is differentiated


def warmup(schedule: str, stages: int, stage: int, micro_batches: int) -> int:
    """How many forward passes a stage does before its first backward pass; it never keeps more micro-batches at once.

    gpipe: all (Huang et al., 2019, https://arxiv.org/abs/1811.06965). 1f1b: as many as the stages that are still ahead,
    itself included, after which forward and backward alternate (Narayanan et al., 2019, https://arxiv.org/abs/1806.03377).
    """
    return micro_batches if schedule == "gpipe" else min(micro_batches, stages - stage)


def operations(schedule: str, stages: int, stage: int, micro_batches: int) -> list[Operation]:
    """What a stage does, in this order. schedule: gpipe or 1f1b; stage: its number, from 0."""
    ahead = warmup(schedule, stages, stage, micro_batches)
    order = [("forward", i) for i in range(ahead)]
    for i in range(micro_batches):
        order.append(("backward", i))
        if ahead + i < micro_batches:
            order.append(("forward", ahead + i))
    return order


class StageThreads:
    """A thread for each stage, kept from step to step: cuDNN and OpenMP set up much in every new thread.

    context: entered around every forward pass, because autocast is thread-local.
    """

    def __init__(self, stages: int, schedule: str, context: Callable[[], AbstractContextManager]) -> None:
        self.schedule, self.context = schedule, context
        self._pool = ThreadPoolExecutor(stages, thread_name_prefix="stage")

    def run(self, stages: Sequence[Stage], inputs: Sequence[Tensor], loss_of: LossOf) -> None:
        """Adds the gradients of all micro-batches to the parameters.

        inputs: of each micro-batch. loss_of is called once per micro-batch, in order, in the thread of the last stage.
        Raises the error of the stage that failed, after all have stopped.
        """
        step = _Step(inputs, loss_of, self.context)
        boundaries = [None, *(_Boundary() for _ in stages[1:]), None]
        running = [
            self._pool.submit(
                _StageWork(stage, boundaries[number], boundaries[number + 1], step).run,
                operations(self.schedule, len(stages), number, len(inputs)),
            )
            for number, stage in enumerate(stages)
        ]
        errors = [work.exception() for work in running]
        for error in errors:
            if error is not None and not isinstance(error, _NeighbourStopped):
                raise error

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


class _NeighbourStopped(Exception):
    """The stage that a tensor should have come from has failed."""


class _Boundary:
    """What two neighbours hand to each other, in the order of the micro-batches."""

    def __init__(self) -> None:
        self.outputs: SimpleQueue[Tensor | None] = SimpleQueue()  # from the earlier stage to the later one
        self.gradients: SimpleQueue[Tensor | None] = SimpleQueue()  # the way back

    def close(self) -> None:
        """Nothing comes any more: the neighbour must not wait for ever."""
        self.outputs.put(None)
        self.gradients.put(None)


def _take(queue: SimpleQueue[Tensor | None]) -> Tensor:
    tensor = queue.get()
    if tensor is None:
        raise _NeighbourStopped
    return tensor


@dataclass(frozen=True)
class _Step:
    """What the stages of one step have in common."""

    inputs: Sequence[Tensor]
    loss_of: LossOf
    context: Callable[[], AbstractContextManager]


@dataclass
class _StageWork:
    """A stage's share of one step. before, after: the boundaries to its neighbours; None at either end."""

    stage: Stage
    before: _Boundary | None
    after: _Boundary | None
    step: _Step
    _under_way: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # micro-batch -> its input and output

    def run(self, order: Sequence[Operation]) -> None:
        try:
            for operation, i in order:
                if operation == "forward":
                    self._forward(i)
                else:
                    self._backward(i)
        finally:
            for boundary in (self.before, self.after):
                if boundary is not None:
                    boundary.close()

    def _forward(self, i: int) -> None:
        x = self.step.inputs[i] if self.before is None else _take(self.before.outputs)
        x = x.detach().to(self.stage.device).requires_grad_(x.requires_grad)
        with self.step.context():
            y = self.stage(x)
            if self.after is None:
                y = self.step.loss_of(i, y)
        if self.after is not None:
            self.after.outputs.put(y)
        self._under_way[i] = x, y

    def _backward(self, i: int) -> None:
        """Nothing to do where this stage and all before it are frozen; both sides of a boundary know that."""
        x, y = self._under_way.pop(i)
        if y.requires_grad:
            y.backward(None if self.after is None else _take(self.after.gradients).to(y.device))
        if self.before is not None and x.requires_grad:
            self.before.gradients.put(x.grad)
