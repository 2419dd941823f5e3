"""The network as a plain nn.Module: uint8 images in, logits out.

classifier.py (training), evaluate.py, predict.py and export.py all use this one module, so what is trained is what is
shipped. It knows nothing of Lightning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from src.engine.runs.plain_values import limited
from src.engine.steps.compiling import compiled_pass
from src.engine.steps.network import Network
from src.engine.weights.preprocessing import Preprocessing
from src.models.backbones import build_backbone
from src.models.heads import KEEP_CLASSIFIER, build_head


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build the network again, as plain values for checkpoints and model.json."""

    backbone: str  # see backbone_names.backbone_names(), or src.my_nets.tiny
    head: str  # see heads.build_head(), or src.my_heads.cosine
    outputs: int = limited(range=(1, 10**5))  # the number of classes
    hidden: int = limited(512, range=(1, 10**5))  # width of the head's hidden layer (head mlp)
    dropout: float = limited(0.0, range=(0.0, 0.95))
    backbone_options: dict[str, Any] = field(default_factory=dict)  # arguments of an own backbone
    head_options: dict[str, Any] = field(default_factory=dict)  # arguments of an own head

    @property
    def keep_classifier(self) -> bool:
        """Whether the backbone keeps its ImageNet classifier."""
        return self.head in KEEP_CLASSIFIER

    def to_dict(self) -> dict[str, Any]:
        """Without the options of built-in parts, which have none."""
        return {key: value for key, value in asdict(self).items() if value != {}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """The inverse of to_dict. TypeError for a missing or unknown key."""
        return cls(**values)


class TransferNetwork(Network):
    """A pretrained backbone with a new head.

    Its state_dict holds 'backbone.*' (the library's own names) and 'head.*' and nothing else: mean and std follow from
    the preprocessing. With channels_last the convolutions work on NHWC memory, which is quicker on CPU and GPU alike
    (https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, head: nn.Module, preprocessing: Preprocessing, *, channels_last: bool = True
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.channels_last = channels_last
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> the same shape in the network's float type, /255, mean and std applied."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return (images.to(self.mean.dtype, memory_format=layout) / 255).sub_(self.mean).div_(self.std)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> the backbone's output (B, F)."""
        images = self.normalise(images)
        if self.compiled and self.training:
            return pooled(compiled_pass()(self.backbone, images))
        return pooled(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or what `features` made of them, (B, F) -> logits (B, outputs)."""
        logits = self.head(images if images.ndim == 2 else self.features(images))
        return logits if self.temperature == 1 else logits.float() / self.temperature


def pooled(features: Tensor) -> Tensor:
    """(B, F), or the mean over the places of a map (B, F, H, W) -> (B, F)."""
    return features.mean((2, 3)) if features.ndim == 4 else features.flatten(1)


def build_network(
    architecture: Architecture,
    preprocessing: Preprocessing,
    *,
    channels_last: bool = True,
    backbone: nn.Module | None = None,
) -> TransferNetwork:
    """The network with random weights, for images of preprocessing.image_size.

    weights.load_pretrained(network.backbone, ...) or load_state_dict come next. backbone: one that was built elsewhere, with
    its ImageNet classifier. Raises UserError for a name that does not exist or a size that the backbone does not take.
    """
    backbone, features = build_backbone(
        architecture.backbone,
        keep_classifier=architecture.keep_classifier,
        image_size=preprocessing.image_size,
        backbone=backbone,
        options=architecture.backbone_options,
    )
    hidden, dropout = architecture.hidden, architecture.dropout
    head = build_head(architecture.head, features, architecture.outputs, hidden, dropout, architecture.head_options)
    return TransferNetwork(backbone, head, preprocessing, channels_last=channels_last)
