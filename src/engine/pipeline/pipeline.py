"""strategy=pipeline: a split network with a process for each stage, on one machine or several.

A batch goes through the stages in micro-batches, several of which are under way at once: while the second stage has the
first of them, the first stage has the second. torch.distributed.pipelining sends them and keeps the order:

- gpipe (Huang et al., 2019, https://arxiv.org/abs/1811.06965): all forward passes, then all backward passes.
- 1f1b (Narayanan et al., 2019, https://arxiv.org/abs/1806.03377): as soon as the last stage has a loss, one backward pass
  after each forward pass, so that a stage keeps the activations of no more micro-batches than there are stages.

Both give the gradients of the unsplit network fed the same micro-batches, to the bit. Every process has the whole network,
but computes with one stage only: the weights of the others stay on the CPU and grow stale. The first process collects
the current weights for checkpoints and at the end of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from src.engine.pipeline.batch_loss import BatchLoss
from src.engine.pipeline.pipeline_stage import LocalStage
from src.engine.steps.engine_module import engine_module, set_device


class Pipeline(DDPStrategy):
    """To be used with the precision of src/engine/pipeline/pipeline_precision.py. The rank of a process is that of its stage.

    Every process is given the same batches. Only the first needs the images (run.py gives black ones to the others, which
    cost nothing to read). The last stage sends loss and logits to all others, so that all compute the same metrics
    and decide alike.

    micro_batches: how many a batch is divided into; one with fewer images has one for each. schedule: 1f1b or gpipe;
    1f1b takes no fewer micro-batches than stages, below that it is gpipe. timeout_seconds: for which a process waits for
    the others, where the process group is not there already.
    """

    shares_batches = False  # all processes work on the same batch: src/engine/images/sampler.py asks

    def __init__(self, micro_batches: int, schedule: str, timeout_seconds: float) -> None:
        self.timeout = timedelta(seconds=timeout_seconds)
        super().__init__(cluster_environment=TorchElasticEnvironment(), timeout=self.timeout)
        self.micro_batches, self.schedule = micro_batches, schedule
        self._local: LocalStage
        self._batch_loss: BatchLoss

    def model_to_device(self) -> None:
        """Only the stage of this process, and what is not part of the network."""
        module, context = engine_module(self.lightning_module), self.precision_plugin.forward_context
        device = self.root_device
        self._local = LocalStage(module.network, device, self.micro_batches, self.schedule, self._loss, context)
        assert len(self._local.stages) == self.world_size
        set_device(module, device)

    def configure_ddp(self) -> None:
        """No wrapper: the processes have no parameter in common."""

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = min(self.micro_batches, len(labels))
        self._batch_loss = BatchLoss(engine_module(self.lightning_module), labels.tensor_split(count))
        self._local.forward_backward(images, labels)
        result = torch.zeros(1 + len(labels) * self._local.outputs, device=self.root_device)
        if self._local.is_last:
            loss, logits = self._batch_loss.result()
            result = torch.cat([loss[None], logits.float().flatten()])
        if getattr(self.precision_plugin, "scaler", None) is None:  # a scaler expects inf, and StageScaler agrees on it
            gradients = [p.grad for p in self._local.stage.parameters() if p.grad is not None]
            result[0] += 0 * torch.nn.utils.get_total_norm(gradients)  # nan where a stage's gradients are not finite
        dist.all_reduce(result)  # of the last stage and zeros
        return result[0], result[1:].view(len(labels), -1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Called in the last stage, in the order of the micro-batches."""
        with self.precision_plugin.forward_context():
            return self._batch_loss.of(len(self._batch_loss.losses), logits)

    def compute(self, images: Tensor) -> Tensor:
        """The module's forward, for validation: uint8 (B, 3, S, S) -> logits (B, outputs) in every process."""
        logits = self._local.forward(images)
        if logits is None:
            logits = torch.empty(len(images), self._local.outputs, device=self.root_device)
        logits = logits.float()
        dist.broadcast(logits, self.world_size - 1)
        return logits

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Called by all; whole in the first process, which saves it."""
        state = super().lightning_module_state_dict()
        tensors = engine_module(self.lightning_module).state_dict(keep_vars=True)
        computed = {id(tensor) for tensor in self._local.stage.state_dict(keep_vars=True).values()}
        for stage in self._gathered({name: state[name] for name, tensor in tensors.items() if id(tensor) in computed}):
            state.update(stage)
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Called by all; whole in the first process. A process has states of the parameters of its own stage only."""
        state: Any = super().optimizer_state(optimizer)
        for stage in self._gathered(state["state"]):
            state["state"].update(stage)
        state["state"] = dict(sorted(state["state"].items()))
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Without the states of the other stages' parameters."""
        computed = {id(parameter) for parameter in self._local.stage.parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            kept = {index: values for index, values in state["state"].items() if id(parameters[index]) in computed}
            optimizer.load_state_dict(state | {"state": kept})

    def on_train_end(self) -> None:
        """The first process goes on alone with the network, to measure and to save it."""
        state = self.lightning_module_state_dict()
        if self.is_global_zero:
            engine_module(self.lightning_module).load_state_dict(state)

    def _gathered(self, local: dict[Any, Any]) -> list[dict[Any, Any]]:
        """In the first process, those of the others, on its CPU: dicts of tensors, or of dicts of tensors. [] elsewhere.

        The tensors are sent one by one, because a GPU may have no room for a copy of all.
        """
        outline = apply_to_collection(local, Tensor, lambda tensor: tensor.to("meta"))
        outlines: list[Any] | None = [None] * self.world_size if self.is_global_zero else None
        dist.gather_object(outline, outlines)
        if outlines is None:
            apply_to_collection(local, Tensor, lambda tensor: dist.send(tensor.to(self.root_device).contiguous(), 0))
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
