"""A training run that survives running out of memory: the same batch again, in parts, with the same result.

Lightning hands its optimizers a closure that runs forward and backward. `RepeatingOptimization` puts its own there: when
memory runs out, it frees what the attempt held, halves the parts and repeats the batch, down to one image at a time.
The parts stay small for the batches to come; after `grow_after` clean steps parts twice as large are tried.

Nothing else notices. Gradient and loss are means over the whole batch, the logs of training_step are made once, its
tensors are joined, and on_train_batch_end sees the batch once. What a failed attempt changed is put back: buffers such as
BatchNorm's statistics, torch's random states, the gradients accumulated so far. Only Lightning's hooks around the
backward pass and before zero_grad run once per part or attempt. BatchNorm in training mode sees parts; it is said once.

What a training_step must be for that: it returns the loss, or {"loss": loss, name: tensor of one row per image, ...},
logs nothing but means, and updates no metric by itself. Where the loss is no plain mean over the images, as torch's
class-weighted cross-entropy is not, the module says in `loss_weight(batch)` by what the mean is divided.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult, _AutomaticOptimization
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from src.callbacks.batch_parts import Log, State, joined_result, make_logs, recorded_logs, shares_of_loss, split
from src.data.module import shared_out
from src.out_of_memory import Exhausted, PartSize, free, gpu_faults_explained, is_out_of_memory, part_sizes
from src.strategies.agreement import Agreement

log = logging.getLogger(__name__)

SNAPSHOT = "out_of_memory_snapshot.pickle"


class OutOfMemory(L.Callback):
    """Repeats a training step in parts when memory runs out (policy='split'), or stops and says what to do ('stop').

    grow_after: clean steps after which larger parts are tried. history: record where the memory of a CUDA device is
    allocated, for the snapshot that the first failure leaves in the run's folder.

    Raises UserError if a single image does not fit, and where nothing can be repeated: when the optimizer's step runs
    out of memory, or the GPU fails.
    """

    def __init__(self, policy: str, grow_after: int, history: bool = False) -> None:
        self.policy, self.history = policy, history
        self.parts = PartSize(grow_after)
        self._optimization: RepeatingOptimization | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        loop = trainer.fit_loop.epoch_loop
        self._optimization = RepeatingOptimization(trainer, self.policy, self.parts)
        self._optimization.optim_progress = loop.automatic_optimization.optim_progress
        loop.automatic_optimization = self._optimization
        if self.history and trainer.strategy.root_device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.policy == "split" and isinstance(trainer.strategy.model, DistributedDataParallel):
            self._optimization.agreement = Agreement(trainer.strategy)
        elif self.policy == "split":
            assert trainer.world_size == 1, "processes that share the work of a step cannot repeat it: policy='stop'"

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._optimization.state = None  # a new phase may train other BatchNorm layers

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.history and trainer.strategy.root_device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def state_dict(self) -> dict[str, Any]:
        """A run that continues begins with the parts it had, so that its sums come out the same to the bit."""
        return asdict(self.parts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self.parts).update(state_dict)


@dataclass
class _Fitted:
    """What came of a batch."""

    result: ClosureResult
    logs: list[list[Log]]  # of each part
    gradients: Tensor | None  # of this process alone, to be averaged over all


class RepeatingOptimization(_AutomaticOptimization):
    """Lightning's automatic optimization, with forward and backward repeated in parts until they fit."""

    def __init__(self, trainer: L.Trainer, policy: str, parts: PartSize) -> None:
        super().__init__(trainer)
        self.policy, self.parts = policy, parts
        self.agreement: Agreement | None = None  # with the other processes of DDP
        self.state: State | None = None
        self._doing = ""
        self._snapshot_saved = False
        self._batchnorm_told = False

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        try:
            with gpu_faults_explained():
                return super().run(optimizer, batch_idx, kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._save_snapshot()
            failure = Exhausted.of(error, self._device)
            if self.policy == "stop":
                images = extract_batch_size(kwargs["batch"])
                raise failure.told_to_stop(self._step, images, shared_out(self.trainer)[1]) from error
            raise failure.in_optimizer(self._step) from error

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device

    @property
    def _step(self) -> int:
        return self.trainer.global_step + 1

    def _make_closure(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int) -> Closure:
        if self.policy == "stop":
            return super()._make_closure(kwargs, optimizer, batch_idx)
        return Closure(partial(self._until_it_fits, kwargs, optimizer, batch_idx))

    def _until_it_fits(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int) -> ClosureResult:
        """Forward and backward of a batch, in ever smaller parts. All processes of DDP make the same attempts."""
        module = self.trainer.lightning_module
        hook = module._current_fx_name
        total = extract_batch_size(kwargs["batch"])
        self.state = self.state or State(module, self._device)
        self.state.keep(gradients=batch_idx % self.trainer.accumulate_grad_batches != 0)
        while True:
            if self.agreement is not None:
                self.agreement.begin(in_parts=self.parts.size is not None)
            sizes = part_sizes(total, self.parts.size or total)
            outcome = self._attempt(kwargs, optimizer, batch_idx, sizes)
            module._current_fx_name = hook  # Lightning leaves it as it was where the error was raised
            failure = outcome if isinstance(outcome, Exhausted) else None
            failed = sizes[0] if failure else 0
            if self.agreement is not None:
                failed = self.agreement.agree(failed)
            if not failed:
                break
            del outcome
            self.state.restore()
            free()
            self._shrink(failed, failure)
        self.state.forget_gradients()
        if outcome.gradients is not None:
            self.agreement.average(outcome.gradients)
        make_logs(module, outcome.logs, sizes)
        if len(sizes) > 1:
            self._warn_of_batchnorm()
        if self.parts.grow():
            size = f"parts of {self.parts.size} images" if self.parts.size else "whole batches"
            log.info(f"no step ran out of memory for a while: trying {size}")
        return outcome.result

    def _attempt(
        self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int, sizes: list[int]
    ) -> _Fitted | Exhausted:
        """Returns the failure instead of raising it: outside of the except block nothing refers to the tensors."""
        try:
            return self._forward_backward(kwargs, optimizer, batch_idx, sizes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._save_snapshot()  # while the tensors are there
            return Exhausted.of(error, self._device)

    def _forward_backward(
        self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int, sizes: list[int]
    ) -> _Fitted:
        """Lightning's closure for each part: training_step, zero_grad before the first backward, backward."""
        zero_grad, backward = self._make_zero_grad_fn(batch_idx, optimizer), self._make_backward_fn(optimizer)
        parts = split(kwargs["batch"], sizes)
        shares = shares_of_loss(self.trainer.lightning_module, parts, sizes)
        outputs, logs = [], []
        for part, share in zip(parts, shares, strict=True):
            self._doing = "forward pass"
            with recorded_logs(self.trainer.lightning_module) as calls:
                result = self._training_step(kwargs | {"batch": part})
            if zero_grad is not None and not outputs:
                zero_grad()
            self._doing = "backward pass"
            if backward is not None and result.closure_loss is not None:
                backward(result.closure_loss if len(parts) == 1 else result.closure_loss * share)
            outputs.append(apply_to_collection(result.asdict(), Tensor, Tensor.detach))
            logs.append(calls)
            del result
        self._doing = "exchange of gradients"
        in_parts = self.agreement is not None and self.parts.size is not None
        gradients = self.agreement.gradients() if in_parts else None
        return _Fitted(joined_result(outputs, shares, sizes), logs, gradients)

    def _shrink(self, failed: int, failure: Exhausted | None) -> None:
        """Halves the parts, which had `failed` images, and says so. failure: None where another process failed."""
        if failed == 1:
            raise (failure or Exhausted.elsewhere(self._device)).with_one_image()
        self.parts.shrink(failed)
        if failure or self.trainer.is_global_zero:
            where = f"the {self._doing} of" if failure else "another process in"
            log.warning(
                f"out of memory in {where} step {self._step} with parts of {failed} images: "
                f"repeated in parts of {self.parts.size}"
            )

    def _warn_of_batchnorm(self) -> None:
        if self.state.trains_batchnorm and not self._batchnorm_told:
            self._batchnorm_told = True
            log.warning(
                "BatchNorm layers in training mode take their statistics from parts of a batch now, which changes the "
                "result a little; freeze.batchnorm=keep would not."
            )

    def _save_snapshot(self) -> None:
        """What is in the memory of a CUDA device, once per run."""
        if self._snapshot_saved or self._device.type != "cuda":
            return
        self._snapshot_saved = True
        rank = self.trainer.global_rank
        path = Path(self.trainer.default_root_dir) / (f"rank{rank}_{SNAPSHOT}" if rank else SNAPSHOT)
        torch.cuda.memory._dump_snapshot(str(path))
        log.warning(f"what fills the GPU's memory is in {path}; https://pytorch.org/memory_viz shows it")
