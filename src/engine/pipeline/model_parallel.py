"""strategy=model_parallel: the stages of a network on several devices, in one process.

The network's forward pass takes a batch from device to device (models/network.py); here its stages are placed. Labels, loss
and metrics are on the last device, where the logits are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from src.engine.pipeline.batch_loss import BatchLoss
from src.engine.pipeline.stage import place, stages_of
from src.engine.pipeline.stage_threads import StageThreads
from src.engine.steps.engine_module import engine_module, set_device


def build_model_parallel(micro_batches: int, schedule: str) -> ModelParallel:
    """The strategy for L.Trainer(strategy=...). schedule: 1f1b or gpipe, the order of several micro-batches."""
    return ModelParallel() if micro_batches == 1 else OverlappedModelParallel(micro_batches, schedule)


class ModelParallel(SingleDeviceStrategy):
    """One stage works at a time: for networks that are too large for one device. The first device is Lightning's root.

    Raises UserError for another number of devices than stages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parallel_devices: list[torch.device] = []  # Lightning fills it in from trainer.devices

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0]

    def model_to_device(self) -> None:
        module = engine_module(self.lightning_module)
        backbone: Any = module.network.backbone
        backbone.check_devices(len(self.parallel_devices))
        set_device(module, self.root_device)
        for child in module.children():
            if child is not module.network:
                child.to(self.parallel_devices[-1])
        place(module.network, self.parallel_devices)
        in_stages = {id(parameter) for stage in stages_of(module.network) for parameter in stage.parameters()}
        outside = [name for name, parameter in module.named_parameters() if id(parameter) not in in_stages]
        assert not outside, f"parameters outside of every stage: {outside}"

    def batch_to_device(
        self, batch: tuple[Tensor, Tensor], device: torch.device | None = None, dataloader_idx: int = 0
    ) -> tuple[Tensor, Tensor]:
        images, labels = super().batch_to_device(batch, device, dataloader_idx)
        return images, labels.to(self.parallel_devices[-1])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """torch puts an optimizer's state beside its parameter; Lightning would move all to the root device."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)


class OverlappedModelParallel(ModelParallel):
    """The stages work at the same time, each on another micro-batch of the batch: src/engine/pipeline/stage_threads.py.

    A batch is divided by tensor_split, as in torch.distributed.pipelining: 10 images in 4 micro-batches are 3, 3, 2 and 2; a
    batch with fewer images than micro_batches goes one by one. BatchNorm in training mode sees micro-batches.
    """

    def __init__(self, micro_batches: int, schedule: str) -> None:
        super().__init__()
        self.micro_batches, self.schedule = micro_batches, schedule
        self._threads: StageThreads | None = None

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        stages = len(self.parallel_devices)
        self._threads = StageThreads(stages, self.schedule, self.precision_plugin.train_step_context)

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        module = engine_module(self.lightning_module)
        count = min(self.micro_batches, len(images))
        loss = BatchLoss(module, labels.tensor_split(count))
        assert self._threads is not None
        self._threads.run(stages_of(module.network), images.tensor_split(count), loss.of)
        return loss.result()

    def teardown(self) -> None:
        if self._threads is not None:  # None where the setup failed
            self._threads.close()
        super().teardown()
