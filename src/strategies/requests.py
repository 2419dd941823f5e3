"""A number that any process may raise while training goes on, and that all see at the same step."""

from __future__ import annotations

import torch
import torch.distributed as dist


class SharedNumber:
    """Every process says a number after each step, and all learn the largest, one step later.

    Nobody waits: the numbers travel while the next step is computed, in the memory of the CPU, so that no GPU is waited
    for. A process that is alone has its answer at once.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        if not self._alone and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        self._sent: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, mine: int) -> int:
        """Says this process's number and returns the largest of those that were said in the step before."""
        if self._alone:
            return mine
        largest = self._receive()
        self._send(mine)
        return largest

    def settle(self, mine: int) -> int:
        """The largest of the numbers that are said now and in the step before; waits for all."""
        if self._alone:
            return mine
        before = self._receive()
        self._send(mine)
        return max(before, self._receive())

    def _send(self, mine: int) -> None:
        number = torch.tensor(mine)
        self._sent = number, dist.all_reduce(number, dist.ReduceOp.MAX, self._group, async_op=True)

    def _receive(self) -> int:
        if self._sent is None:
            return 0
        number, work = self._sent
        work.wait()
        self._sent = None
        return int(number)
