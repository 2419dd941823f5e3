"""Non-blocking all-reduce (MAX) of one integer: every rank learns the largest value at the same step. Used for stop signals."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy

SECONDS_BETWEEN = 0.5  # exchanges, about; where steps take longer, there is one in every step
MOST_STEPS_BETWEEN = 1000


class SharedMaximum:
    """Ranks exchange their values now and then, and learn the largest one step after an exchange has begun.

    No rank waits: the values travel in the memory of the CPU while the next step is computed, so no GPU is waited for.
    The number of steps until the next exchange follows from the slowest rank's time per step, which is exchanged too, so
    that all ranks begin it at the same step. A process that is alone has its answer at once.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._group: dist.ProcessGroup | None = None
        self._alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        if not self._alone and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=strategy.timeout)  # torch's own: 30 minutes
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._steps, self._began = 0, time.monotonic()  # since the last exchange
        self._steps_between = 1

    def exchange(self, value: int) -> int:
        """Called after every step. Returns the largest value where all ranks have just learnt it, and 0 otherwise."""
        if self._alone:
            return value
        largest = self.receive()
        self._steps += 1
        if self._steps >= self._steps_between:
            self.send(value)
        return largest

    def settle(self, value: int) -> int:
        """The largest of the values sent now and of those under way; waits for all ranks."""
        if self._alone:
            return value
        before = self.receive()
        self.send(value)
        return max(before, self.receive())

    def send(self, value: int) -> None:
        """Begins an exchange without waiting; `receive` ends it."""
        now = time.monotonic()
        step_microseconds = int(1e6 * (now - self._began) / max(1, self._steps))
        self._steps, self._began = 0, now
        values = torch.tensor([value, step_microseconds])
        self._pending = values, dist.all_reduce(values, dist.ReduceOp.MAX, self._group, async_op=True)

    def receive(self) -> int:
        """The largest of the values sent last; waits for all ranks. 0 where no exchange is under way."""
        if self._pending is None:
            return 0
        values, work = self._pending
        work.wait()
        self._pending = None
        largest, step_microseconds = values.tolist()
        steps = int(1e6 * SECONDS_BETWEEN / max(1, step_microseconds))
        self._steps_between = max(1, min(MOST_STEPS_BETWEEN, steps))
        return largest
