"""What the processes of ddp do together when the memory of one of them runs out, so that none waits for ever.

Whole batches go DistributedDataParallel's own way, which averages the gradients bucket by bucket while the backward pass
still runs. A process that fails in it owes the others the buckets that it has not sent: it sends zeros, which nobody uses,
since all learn of the failure next and repeat the batch. torch's `Join` does the same for a process without batches.

While batches are run in parts there is no wrapper. It could not be used again after a backward pass that did not end, and
its buckets are as large as all gradients. The gradients are averaged in one piece after the last part. When whole batches
fit again, so does a new wrapper.

A step without a failure pays for this with the reduction of one number, which the CPUs exchange: no GPU is waited for. It
is sent right after the last bucket of gradients, after which nothing can run out of memory any more. Layers that
communicate by themselves, such as SyncBatchNorm, cannot be repeated in this way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from src.engine.commands.user_command import corrected
from src.engine.memory.out_of_memory import free
from src.engine.processes.ddp import Ddp
from src.engine.processes.shared_maximum import SharedMaximum
from src.engine.runs.errors import UserError


class Agreement:
    """Every process calls begin, collect, agree and average in the same order; collect only if nothing failed in it."""

    def __init__(self, strategy: Ddp) -> None:
        self.strategy = strategy
        self._sent = 0  # buckets, in this backward pass
        self._reported = False  # whether the others know that nothing failed here
        self._failures = SharedMaximum(strategy)
        self._gradients: Tensor | None = None  # of a batch in parts: a copy of all, in one piece
        if strategy.communicate is not None:
            raise UserError(
                "the strategy communicates in its own way, which does not go with oom.policy=split",
                why="a batch that does not fit is repeated in parts, whose gradients the processes exchange by other messages",
                fix=corrected("oom.policy=stop"),
            )
        strategy.communicate = self._send
        strategy.configure_ddp()

    def begin(self, in_parts: bool) -> None:
        """Before an attempt at a batch."""
        self._sent, self._reported = 0, False
        if in_parts and self.strategy.wrapper is not None:
            self.strategy.wrapper._remove_autograd_hooks()  # they would send, if something else refers to the wrapper
            self.strategy.wrapper = None
        elif not in_parts and self.strategy.wrapper is None:
            self.strategy.configure_ddp()

    def _send(self, state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        """Sends a bucket as DDP would, and counts it."""
        self._sent += 1
        future = allreduce_hook(None, bucket)
        if bucket.is_last():
            self._reported = True
            self._failures.send(0)
        return future

    def collect(self) -> None:
        """Copies the gradients of a batch in parts. The copy may not fit: it is made before the processes agree."""
        if self.strategy.wrapper is None:
            self._gradients = torch.cat([gradient.flatten() for gradient in self._own_gradients()])

    def agree(self, failed: int) -> int:
        """failed: the size of the parts that did not fit here, or 0; returns the largest of all processes."""
        assert not (failed and self._reported), "out of memory after the last gradient was sent"
        if failed and self.strategy.wrapper is not None:
            free()  # zeros take as much as all gradients
            for bucket in self.strategy.wrapper.reducer._get_zeros_like_grad_buckets()[self._sent :]:
                allreduce_hook(None, bucket).wait()
        if not self._reported:
            self._failures.send(failed)
        largest = self._failures.receive()
        if largest:
            self._gradients = None
        return largest

    def average(self) -> None:
        """Puts the mean over all processes in the place of the gradients of a batch in parts."""
        gradients, self._gradients = self._gradients, None
        if gradients is None:  # DistributedDataParallel has done it
            return
        gradients.div_(dist.get_world_size())
        dist.all_reduce(gradients)
        own = self._own_gradients()
        for gradient, mean in zip(own, gradients.split([gradient.numel() for gradient in own]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _own_gradients(self) -> list[torch.Tensor]:
        module = self.strategy.lightning_module
        assert module is not None
        return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
