"""The network as a plain nn.Module: uint8 images in, logits out.

classifier.py (training), evaluate.py, predict.py and export.py all use this one module, so what is trained is what is
shipped. It knows nothing of Lightning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.engine.runs.plain_values import limited
from src.engine.steps.network import Network
from src.engine.weights.preprocessing import Preprocessing
from src.models.backbones import build_backbone
from src.models.heads import HEADS, KEEP_CLASSIFIER, build_head


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build the network again, as plain values for checkpoints and model.json."""

    backbone: str  # see backbone_names.backbone_names()
    head: str = limited(options=tuple(HEADS))  # see heads.build_head()
    outputs: int = limited(range=(1, 10**5))  # the number of classes
    hidden: int = limited(512, range=(1, 10**5))  # width of the head's hidden layer (head mlp)
    dropout: float = limited(0.0, range=(0.0, 0.95))

    @property
    def keep_classifier(self) -> bool:
        """Whether the backbone keeps its ImageNet classifier."""
        return self.head in KEEP_CLASSIFIER

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

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
        return self.backbone(self.normalise(images)).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> logits (B, outputs)."""
        return self.head(self.features(images))


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
    )
    head = build_head(architecture.head, features, architecture.outputs, architecture.hidden, architecture.dropout)
    return TransferNetwork(backbone, head, preprocessing, channels_last=channels_last)
