"""What the engine asks of a task: src/task.py builds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch.optim import Optimizer

from src.engine.commands.schema import Config
from src.engine.images.labelled_images import LabelledImages
from src.engine.runs.job import Job
from src.engine.runs.model_folder import ModelCard
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.network import Network
from src.engine.steps.task_kind import Loss, TaskKind
from src.engine.weights.preprocessing import Preprocessing


class Freezing(Protocol):
    """Which parts of the network learn in which epoch: src/models/freezing.py."""

    @property
    def phases(self) -> dict[int, list[str]]:
        """Epoch, counted from 0 -> modules that learn from then on."""
        ...

    @property
    def max_epochs(self) -> int: ...

    def backbone_is_frozen(self, epoch: int) -> bool: ...

    def apply(self, network: Any, epoch: int) -> bool: ...

    def apply_last(self, network: Any) -> bool: ...

    def described(self, network: Any) -> str: ...


@dataclass(frozen=True)
class RunTask:
    """What is learned. The network is changed by training, the rest stays as it is."""

    images: LabelledImages
    kind: TaskKind
    card: ModelCard  # how an image becomes the network's input and what its outputs mean; still without metrics
    network: Network
    freezing: Freezing
    origin: str  # the line that says which weights the backbone started from

    @property
    def preprocessing(self) -> Preprocessing:
        return self.card.preprocessing

    def trained(self, job: Job) -> TrainedModel:
        """The network with the weights that it has now, to be measured."""
        return TrainedModel(self.card, self.network, self.kind, job.device, job.config.precision.name)

    def loss(self, config: Config) -> Loss:
        """A new loss, as the config says."""
        return self.kind.loss(config, self.images.classes, self.images.targets(self.images.splits["train"]))

    def optimizer(self, config: Config, network: Network) -> Optimizer:
        """A new optimizer of the task's network, or of a copy of it."""
        raise NotImplementedError
