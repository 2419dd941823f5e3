"""A trained model in use: what evaluate, predict, export, the end of a run and a notebook compute with.

model = TrainedModel.load(Path("runs/NAME/model"), rebuild)  # rebuild is in src/models/building.py
probabilities = model.predict(model.read("image.jpg")[None])  # (1, number of classes)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from src.engine.images.reading import encoded, pixels_of, read_image
from src.engine.images.resizing import eval_transform
from src.engine.memory.out_of_memory import InParts
from src.engine.runs.machine import choose_device, set_threads
from src.engine.runs.model_folder import ModelCard, load_model
from src.engine.steps.network import Network
from src.engine.steps.precision import autocast, check_precision, usable_precision
from src.engine.steps.task_kind import TaskKind

CPU = torch.device("cpu")
# The card and the weights of a model/ folder, and the folder for messages -> its network and its task.
Rebuild = Callable[[ModelCard, dict[str, Tensor], Path], tuple[Network, TaskKind]]


class TrainedModel:
    """card: what the network takes, and what its outputs mean. precision: fp32, fp16 or bf16, in which it computes. folder:
    the model/ folder that it was read from."""

    def __init__(
        self,
        card: ModelCard,
        network: Network,
        kind: TaskKind,
        device: torch.device = CPU,
        precision: str = "fp32",
        folder: Path | None = None,
    ) -> None:
        self.card, self.kind, self.device, self.precision, self.folder = card, kind, device, precision, folder
        self.network = network.to(device).eval()
        self.network.temperature = kind.temperature
        self._forward, self._features = InParts(self.network), InParts(self.network.features)

    @classmethod
    def load(
        cls,
        folder: Path,
        rebuild: Rebuild,
        accelerator: str = "cpu",
        precision: str | None = None,
        threads: int | None = None,
    ) -> TrainedModel:
        """The model of a model/ folder.

        rebuild: makes its network and its task, as src/models/building.py does. accelerator: auto, cpu, gpu or mps.
        precision: None for that of the training, or fp32 where the device does not have it. threads: of the CPU; None for
        torch's default.
        Raises UserError for a folder, device or precision that cannot be used.
        """
        card, state = load_model(folder)
        device = choose_device(accelerator)
        if precision is None:
            precision = usable_precision(card.precision, device)
        else:
            check_precision(precision, device)
        set_threads(threads)
        return cls(card, *rebuild(card, state, folder), device, precision, folder)

    def read(self, image: str | Path | Image | Tensor) -> Tensor:
        """A file, a PIL image or a tensor uint8 (3, H, W) as the network takes it: uint8 (3, S, S). Raises ImageError."""
        if isinstance(image, Image):
            image, _ = pixels_of(encoded(image), "the image", self.card.read_options)
        elif not isinstance(image, Tensor):
            image = read_image(image, self.card.read_options)
        return eval_transform(self.card.preprocessing)(image)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> float32 (B, outputs), on the device. A batch that does not fit is computed in parts."""
        with autocast(self.precision, self.device):
            return self._forward(images.to(self.device, non_blocking=True)).float()

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> what the backbone makes of them, float32 (B, F), on the device."""
        with autocast(self.precision, self.device):
            return self._features(images.to(self.device, non_blocking=True)).float()

    def as_network(self) -> nn.Module:
        """uint8 (B, 3, S, S) -> logits float32 (B, outputs): what an export writes."""
        return self.network

    def predict(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> the probability of each class, or the values of task=regression: float32 (B, number of
        card.classes), on the CPU."""
        return self.kind.answers(self.logits(images)).cpu()
