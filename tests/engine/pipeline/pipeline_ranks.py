"""One of two processes, each with a stage of a narrow ResNet50: test_pipeline.py starts this file twice, and reads what
it left.

Every training is done twice: with strategy=pipeline by both processes, and by one of them alone, with the unsplit network
and the same micro-batches one after another. The folder that is given gets, for each of them:

    alone/NAME/ and pipeline/NAME/    last.ckpt, previous.ckpt (of the epoch before), network.pt, rank0.json, rank1.json
    continued/                        the same, of a training that strategy=pipeline took over after an epoch
    batches0.json, batches1.json      what single batches came to, in the processes
    error0.txt                        what process 0 was told when there was an error in process 1
"""

from __future__ import annotations

import copy
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from src.callbacks.freezing import FreezingSchedule
from src.config import Optimizer
from src.engine.pipeline.batch_loss import BatchLoss
from src.engine.pipeline.pipeline import Pipeline
from src.engine.pipeline.pipeline_precision import stage_precision
from src.engine.pipeline.pipeline_stage import LocalStage
from src.engine.runs.position import PositionCheckpoint
from src.engine.runs.writing import PREVIOUS, DurableCheckpointIO
from src.engine.steps.engine_module import Training
from src.engine.steps.precision import precision_plugin
from src.engine.weights.preprocessing import Preprocessing
from src.models.classifier import Classifier
from src.models.freezing import FreezePlan
from src.models.losses import ClassificationLoss
from src.models.model_parallel_resnet50 import UNITS
from src.models.network import TransferNetwork
from tests.engine.pipeline.narrow import Narrow, unsplit
from tests.engine.runs.small_training import metrics_of

CPU = torch.device("cpu")
CLASSES, SIZE = 3, 32
SECONDS = 60.0  # before a process that waits gives up
WEIGHTS = [0.5, 1.0, 2.5]  # of the classes

# name: (micro-batches, images, whether BatchNorm is in train mode); each with both schedules
BATCHES = {
    **{f"m={m}": (m, 16, True) for m in (1, 2, 4, 8)},
    "uneven parts": (4, 10, True),
    "fewer images than parts": (4, 3, False),
}


def rank() -> int:
    return int(os.environ["RANK"])


def build_network(channels_last: bool = True) -> TransferNetwork:
    """The same weights at every call."""
    torch.manual_seed(0)
    backbone = Narrow(split_at=["layer2"])
    square = Preprocessing(SIZE, 1.0, "bilinear", (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    return TransferNetwork(backbone, nn.Linear(2048, CLASSES), square, channels_last=channels_last)


def make_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise, and labels that its brightness tells."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.randint(0, 120, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return noise + 60 * labels.to(torch.uint8)[:, None, None, None], labels


class Torchvision(nn.Module):
    """torchvision's own ResNet, of the same widths, in the place of the split one."""

    def __init__(self, network: TransferNetwork) -> None:
        super().__init__()
        self.backbone, self.head, self.normalise = unsplit(), network.head, network.normalise
        self.backbone.fc = nn.Identity()
        self.backbone.load_state_dict(network.backbone.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(self.normalise(images)))


def in_stage(name: str) -> bool:
    """Whether the tensor of that name belongs to the stage of this process, with a cut after layer2."""
    first = any(name.startswith(f"backbone.{unit}.") for unit in UNITS[: UNITS.index("layer3.0")])
    return first == (rank() == 0)


def compare_batches() -> dict[str, Any]:
    """Of each batch, by schedule: what is not the same as with torchvision's network, to the bit."""
    split = build_network(channels_last=False)
    unsplit, start = Torchvision(build_network(channels_last=False)), copy.deepcopy(split.state_dict())
    found: dict[str, Any] = {}
    for name, (micro_batches, count, train) in BATCHES.items():
        images, labels = make_images(count)

        def share(logits: Tensor, labels: Tensor, losses: list[float], count: int = count) -> Tensor:
            loss = nn.functional.cross_entropy(logits, labels) * (len(labels) / count)
            losses.append(loss.item())
            return loss

        expected: list[float] = []
        unsplit.load_state_dict(start)
        unsplit.train(train).zero_grad()
        parts = min(count, micro_batches)
        for some, theirs in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            share(unsplit(some), theirs, expected).backward()

        for schedule in ("gpipe", "1f1b"):
            losses: list[float] = []
            split.load_state_dict(start)
            split.train(train).zero_grad()
            stage = LocalStage(split, CPU, micro_batches, schedule, partial(share, losses=losses), nullcontext)
            stage.forward_backward(images, labels)
            found[f"{schedule}, {name}"] = {
                "loss": losses == (expected if rank() == 1 else []),
                "schedules": [type(schedule).__name__ for schedule in stage._schedules.values()],
            } | compare_tensors(split, unsplit)
    return found


def compare_tensors(split: nn.Module, unsplit: nn.Module) -> dict[str, Any]:
    """The names of gradients and of BatchNorm's statistics in the own stage that differ, and how many there are; the names
    of gradients in the other stage, where there should be none."""
    gradients = {name: parameter.grad for name, parameter in split.named_parameters() if in_stage(name)}
    statistics = {
        name: buffer for name, buffer in split.named_buffers() if in_stage(name) and name.startswith("backbone")
    }
    right = {name: parameter.grad for name, parameter in unsplit.named_parameters()} | dict(unsplit.named_buffers())
    return {
        "wrong": [name for name, tensor in (gradients | statistics).items() if not torch.equal(tensor, right[name])],
        "compared": [len(gradients), len(statistics)],
        "others": [name for name, p in split.named_parameters() if p.grad is not None and not in_stage(name)],
    }


class InTurn(SingleDeviceStrategy):
    """The unsplit network, fed the micro-batches one after another."""

    def __init__(self, micro_batches: int) -> None:
        super().__init__("cpu")
        self.micro_batches = micro_batches

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        module, parts = self.lightning_module, min(self.micro_batches, len(labels))
        loss = BatchLoss(module, labels.tensor_split(parts))
        for number, some in enumerate(images.tensor_split(parts)):
            with self.precision_plugin.forward_context():
                share = loss.of(number, module(some))
            share.backward()
        return loss.result()


@dataclass(frozen=True)
class Scenario:
    """A training with Lightning. overflow: the rank in whose stage a gradient of the first step is infinite."""

    micro_batches: int = 4
    schedule: str = "1f1b"
    precision: str = "fp32"
    phases: tuple[tuple[int, tuple[str, ...]], ...] = ((0, ("backbone", "head")),)
    batch: int = 10
    train: int = 18
    validate: int = 7
    epochs: int = 2
    clip: float | None = None
    optimizer: str = "adamw"
    overflow: int | None = None


SCENARIOS = {
    "class weights, clipped": Scenario(clip=0.5),
    "frozen first stage, then all": Scenario(
        phases=((0, ("backbone.layer4", "head")), (1, ("backbone",))), schedule="gpipe", clip=0.5, optimizer="sgd"
    ),
    "bf16": Scenario(micro_batches=2, precision="bf16", train=8, epochs=1, batch=4),
    "fp16": Scenario(micro_batches=2, precision="fp16", train=16, epochs=1, batch=8, clip=0.5, overflow=0),
    "fp16, frozen first stage": Scenario(
        micro_batches=2, precision="fp16", train=16, epochs=1, batch=8, phases=((0, ("head",)),), overflow=1
    ),
}


class Watch(L.Callback):
    """Notes what a process sees, and makes a gradient infinite in its stage."""

    def __init__(self, overflow: str | None) -> None:
        self.overflow = overflow
        self.seen: dict[str, list[Any]] = {"losses": [], "metrics": [], "scales": []}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # small enough for gradients not to overflow by themselves
            scaler.load_state_dict(scaler.state_dict() | {"scale": 4.0})

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.overflow is not None and trainer.global_step == 0 and not self.seen["losses"]:
            pl_module.network.get_parameter(self.overflow).grad.fill_(torch.inf)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen["losses"].append(float(outputs["loss"]))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.seen["scales"].append(scaler.get_scale())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen["metrics"].append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(scenario: Scenario, folder: Path, alone: bool, resume: Path | None = None, *more: L.Callback) -> None:
    """alone: the unsplit network, in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    network = build_network()
    model = Classifier(
        network,
        ClassificationLoss(WEIGHTS, label_smoothing=0.1),
        Optimizer(name=scenario.optimizer, lr=1e-3),
        Training(total_steps=10, gradient_clip=scenario.clip, hparams={"backbone": "resnet50"}),
        *metrics_of(CLASSES),
    )
    overflows = scenario.overflow is not None and (alone or scenario.overflow == rank())
    layer = ("backbone.conv1.weight", "head.weight")[scenario.overflow or 0]
    watch = Watch(layer if overflows else None)
    plan = FreezePlan({epoch: list(names) for epoch, names in scenario.phases}, scenario.epochs)
    name, parts = scenario.precision, scenario.micro_batches
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if alone else 2,
        strategy=InTurn(parts) if alone else Pipeline(parts, scenario.schedule, SECONDS),
        plugins=[DurableCheckpointIO(background=False), (precision_plugin if alone else stage_precision)(name, CPU)],
        callbacks=[FreezingSchedule(plan), watch, PositionCheckpoint(folder), *more],
        max_epochs=scenario.epochs,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = [
        DataLoader(TensorDataset(*make_images(count, seed)), scenario.batch)
        for seed, count in enumerate((scenario.train, scenario.validate))
    ]
    trainer.fit(model, *loaders, ckpt_path=resume, weights_only=True if resume else None)
    if alone or rank() == 0:  # the network as it is after the training, to go on with
        torch.save(network.state_dict(), folder / "network.pt")
    (folder / f"rank{0 if alone else rank()}.json").write_text(json.dumps(watch.seen))


class Failing(L.Callback):
    """An error in the stage of one process."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if rank() == 1:
            pl_module.network.head.register_forward_pre_hook(self.fail)

    def fail(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        raise ZeroDivisionError("only here")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        if number % 2 == rank():
            train(scenario, folder / "alone" / name, alone=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    dist.barrier()
    (folder / f"batches{rank()}.json").write_text(json.dumps(compare_batches()))
    for name, scenario in SCENARIOS.items():
        train(scenario, folder / "pipeline" / name, alone=False)
    name, scenario = next(iter(SCENARIOS.items()))
    train(scenario, folder / "continued", False, folder / "alone" / name / PREVIOUS)
    try:
        train(scenario, folder / "failing", False, None, Failing())
    except RuntimeError as error:
        (folder / f"error{rank()}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
