"""A number that any process may raise while training goes on, and that all see at the same step."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy

EVERY_SECONDS = 0.5  # about; where steps take longer, every step
LONGEST_WAIT = 1000  # steps


class SharedNumber:
    """Every process says a number after each step; now and then all learn the largest, one step after it was asked for.

    Nobody waits: the numbers travel while the next step is computed, in the memory of the CPU, so that no GPU is waited
    for. How many steps pass until the next exchange follows from the slowest process's time per step, which is exchanged
    too: so all do it at the same step. A process that is alone has its answer at once.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._group: dist.ProcessGroup | None = None
        self._alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        if not self._alone and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=strategy.timeout)  # Ddp's; torch would wait 30 minutes
        self._under_way: tuple[torch.Tensor, dist.Work] | None = None
        self._steps, self._since = 0, time.monotonic()  # since the last exchange
        self._wait = 1  # steps from one exchange to the next

    def exchange(self, mine: int) -> int:
        """Called after every step, with this process's number. Returns the largest one where it has just become known to
        all, and 0 otherwise."""
        if self._alone:
            return mine
        largest = self.hear()
        self._steps += 1
        if self._steps >= self._wait:
            self.say(mine)
        return largest

    def settle(self, mine: int) -> int:
        """The largest of the numbers that are said now, and of those that are under way; waits for all."""
        if self._alone:
            return mine
        before = self.hear()
        self.say(mine)
        return max(before, self.hear())

    def say(self, mine: int) -> None:
        """Sends this process's number and does not wait; hear comes next."""
        now = time.monotonic()
        step_microseconds = int(1e6 * (now - self._since) / max(1, self._steps))
        self._steps, self._since = 0, now
        numbers = torch.tensor([mine, step_microseconds])
        self._under_way = numbers, dist.all_reduce(numbers, dist.ReduceOp.MAX, self._group, async_op=True)

    def hear(self) -> int:
        """The largest of the numbers that were said last; waits for all. 0 where none is under way."""
        if self._under_way is None:
            return 0
        numbers, work = self._under_way
        work.wait()
        self._under_way = None
        largest, step_microseconds = numbers.tolist()
        self._wait = max(1, min(LONGEST_WAIT, int(1e6 * EVERY_SECONDS / max(1, step_microseconds))))
        return largest
