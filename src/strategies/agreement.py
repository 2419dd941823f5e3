"""What the processes of DDP do together when the memory of one of them runs out, so that none waits for ever.

Whole batches go DDP's own way, which averages the gradients bucket by bucket while the backward pass still runs. A process
that fails in it owes the others the buckets that it has not sent: it sends zeros, which nobody uses, since all learn of
the failure next and repeat the batch. DDP's `Join` does the same for a process that has run out of batches.

While batches are run in parts the DDP wrapper is taken off. It could not be used again after a backward pass that did not
end, its buckets are as large as all gradients, and it would exchange buffers in forward passes whose number may differ
between the processes. The gradients are averaged in one piece after the last part. When whole batches fit again, so does
a new wrapper.

A step without a failure pays for this with the reduction of one number, which the CPUs exchange: no GPU is waited for. It
is sent right after the last bucket of gradients, after which nothing can run out of memory any more. Layers that
communicate by themselves, such as SyncBatchNorm, cannot be repeated in this way.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from src.out_of_memory import free
from src.strategies.requests import SharedNumber


class Agreement:
    """Every process calls begin, agree and, in parts, average in the same order, whatever happened to it."""

    def __init__(self, strategy: DDPStrategy) -> None:
        self.strategy = strategy
        self._sent = 0  # buckets, in this backward pass
        self._said = False  # whether the others know already that nothing failed here
        self._failures = SharedNumber(strategy)
        self._counted: weakref.ref[DistributedDataParallel] | None = None  # the wrapper whose buckets are counted

    def begin(self, in_parts: bool) -> None:
        """Before an attempt at a batch: puts the DDP wrapper on or takes it off."""
        self._sent, self._said = 0, False
        model = self.strategy.model
        if in_parts:
            if isinstance(model, DistributedDataParallel):
                model._remove_autograd_hooks()  # they would send, if something else refers to the wrapper
                self.strategy.model = self.strategy.lightning_module
            self._share_buffers()
            return
        if not isinstance(model, DistributedDataParallel):
            self.strategy.configure_ddp()
            model = self.strategy.model
        if self._counted is None or self._counted() is not model:
            assert not model.find_unused_parameters, "the processes would owe each other more than the buckets"
            model.register_comm_hook(None, self._send)
            self._counted = weakref.ref(model)

    def _share_buffers(self) -> None:
        """All take those of the first process, as DDP does before a forward pass."""
        buffers = list(self.strategy.lightning_module.buffers())
        dist._broadcast_coalesced(dist.group.WORLD, buffers, 250 * 2**20, 0)

    def _send(self, state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        """Sends a bucket as DDP would, and counts it."""
        self._sent += 1
        future = allreduce_hook(None, bucket)
        if bucket.is_last():
            self._said = True
            self._failures.say(0)
        return future

    def agree(self, failed: int) -> int:
        """failed: the size of the parts that did not fit here, or 0; returns the largest of all processes."""
        model = self.strategy.model
        assert not (failed and self._said), "out of memory after the last gradient was sent"
        if failed and isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
            free()  # zeros take as much as all gradients
            for bucket in model.reducer._get_zeros_like_grad_buckets()[self._sent :]:
                allreduce_hook(None, bucket).wait()
        if not self._said:
            self._failures.say(failed)
        return self._failures.hear()

    def gradients(self) -> Tensor:
        """A copy of all gradients in one piece, which may not fit: to be made before the processes agree."""
        return torch.cat([parameter.grad.flatten() for parameter in self._with_gradient()])

    def average(self, gradients: Tensor) -> None:
        """Puts the mean over all processes in the place of the gradients."""
        gradients.div_(dist.get_world_size())
        dist.all_reduce(gradients)
        parameters = self._with_gradient()
        for parameter, mean in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(mean.view_as(parameter))

    def _with_gradient(self) -> list[torch.nn.Parameter]:
        return [p for p in self.strategy.lightning_module.parameters() if p.grad is not None]
