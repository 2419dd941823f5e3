"""A training run that survives running out of memory: the same batch again, in parts, with the same result.

When memory runs out in a forward or backward pass, what the attempt held is freed, the parts are halved and the batch is
repeated, down to one image at a time. The parts stay small for the batches to come; after `grow_after` clean steps parts
twice as large are tried.

Nothing else notices: gradient and loss are means over the whole batch, and what a failed attempt changed is put back.
BatchNorm in training mode sees parts; a warning says so once.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from src.engine.images.sampler import share_of
from src.engine.memory.out_of_memory import Exhausted, PartSize, free, is_out_of_memory, part_sizes
from src.engine.processes.agreement import Agreement
from src.engine.processes.ddp import Ddp
from src.engine.steps.engine_module import Batch, EngineModule, Outputs, engine_module
from src.engine.steps.step_snapshot import StepSnapshot

log = logging.getLogger(__name__)

SNAPSHOT = "out_of_memory_snapshot.pickle"


class OutOfMemory(L.Callback):
    """Repeats a training step in parts when memory runs out (policy='split'), or stops and says what to do ('stop').

    grow_after: clean steps after which larger parts are tried. history: record where the memory of a CUDA device is
    allocated, for the snapshot that the first failure leaves in the run's folder.

    Raises UserError if a single image does not fit, and where nothing can be repeated: when the optimizer's step runs
    out of memory.
    """

    def __init__(self, policy: str, grow_after: int, history: bool = False) -> None:
        self.policy, self.history = policy, history
        self.parts = PartSize(grow_after)
        self._trainer: L.Trainer
        self._agreement: Agreement | None = None  # with the other processes of ddp
        self._before: StepSnapshot | None = None
        self._phase = ""
        self._snapshot_saved = False
        self._batchnorm_told = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer
        engine_module(pl_module).repeater = self
        if self.history and self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.policy == "split" and isinstance(trainer.strategy, Ddp):
            self._agreement = Agreement(trainer.strategy)
        elif self.policy == "split":
            assert trainer.world_size == 1, "processes that share the work of a step cannot repeat it: policy='stop'"

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before = None  # a new phase may train other BatchNorm layers

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._phase = "backward pass"

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase = "forward pass"

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        engine_module(pl_module).repeater = None
        if self.history and self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def state_dict(self) -> dict[str, Any]:
        """A run that continues begins with the parts it had, so that its sums come out the same to the bit."""
        return asdict(self.parts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.parts = replace(self.parts, **state_dict)

    @property
    def _device(self) -> torch.device:
        return self._trainer.strategy.root_device

    @property
    def _step(self) -> int:
        return self._trainer.global_step + 1

    def run(self, module: EngineModule, batch: Batch) -> Outputs:
        """A training step: forward and backward passes, and the optimizer's step."""
        try:
            whole = self.policy == "stop"
            outputs = module.forward_backward([batch]) if whole else self._until_it_fits(module, batch)
            module.update_weights(outputs)
            return outputs
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._save_snapshot()
            failure = Exhausted.of(error, self._device)
            if self.policy == "stop":
                raise failure.told_to_stop(self._step, len(batch[1]), share_of(self._trainer).world) from error
            raise failure.in_optimizer(self._step) from error

    def _until_it_fits(self, module: EngineModule, batch: Batch) -> Outputs:
        """Forward and backward pass of a batch, in ever smaller parts. All processes of ddp make the same attempts."""
        images, labels = batch
        self._before = self._before or StepSnapshot(module, self._device)
        self._before.keep()
        while True:
            sizes = part_sizes(len(images), self.parts.size or len(images))
            parts = list(zip(images.split(sizes), labels.split(sizes), strict=True))
            if self._agreement is not None:
                self._agreement.begin(in_parts=self.parts.size is not None)
            outcome = self._attempt(module, parts)
            failure = outcome if isinstance(outcome, Exhausted) else None
            failed = sizes[0] if failure else 0
            if self._agreement is not None:
                failed = self._agreement.agree(failed)
            if not failed:
                break
            del outcome
            self._before.restore()
            free()
            self._shrink(failed, failure)
        if self._agreement is not None:
            self._agreement.average()
        if len(parts) > 1:
            self._warn_of_batchnorm()
        if self.parts.grow():
            size = f"parts of {self.parts.size} images" if self.parts.size else "whole batches"
            log.info(f"no step ran out of memory for a while: trying {size}")
        assert not isinstance(outcome, Exhausted)
        return outcome

    def _attempt(self, module: EngineModule, parts: list[Batch]) -> Outputs | Exhausted:
        """Returns the failure instead of raising it: outside of the except block nothing refers to the tensors."""
        self._phase = "forward pass"
        try:
            outputs = module.forward_backward(parts)
            self._phase = "exchange of gradients"
            if self._agreement is not None:
                self._agreement.collect()
            return outputs
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._save_snapshot()  # while the tensors are there
            return Exhausted.of(error, self._device)

    def _shrink(self, failed: int, failure: Exhausted | None) -> None:
        """Halves the parts, which had `failed` images, and says so. failure: None where another process failed."""
        if failed == 1:
            raise (failure or Exhausted.elsewhere(self._device)).with_one_image()
        self.parts.shrink(failed)
        if failure or self._trainer.is_global_zero:
            where = f"the {self._phase} of" if failure else "another process in"
            log.warning(
                f"out of memory in {where} step {self._step} with parts of {failed} images: "
                f"repeated in parts of {self.parts.size}"
            )

    def _warn_of_batchnorm(self) -> None:
        if self._before.trains_batchnorm and not self._batchnorm_told:
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
        rank = self._trainer.global_rank
        path = Path(self._trainer.default_root_dir) / (f"rank{rank}_{SNAPSHOT}" if rank else SNAPSHOT)
        torch.cuda.memory._dump_snapshot(str(path))
        log.warning(f"what fills the GPU's memory is in {path}; https://pytorch.org/memory_viz shows it")
