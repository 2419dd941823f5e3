"""The model's layers and tensors: a line on the screen, the whole in model_summary.txt."""

from __future__ import annotations

from pathlib import Path

import torch
import torchinfo

from src.engine.runs.files import write_text
from src.engine.steps.network import Network


def write_summary(path: Path, network: Network, image_size: int) -> str:
    """Writes torchinfo's table at the real input size and the list of tensors; returns the line for the screen.

    Trainable and frozen are counted as the network stands: in the first epoch.
    """
    images = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    info = torchinfo.summary(
        network,
        input_data=images,
        col_names=("input_size", "output_size", "num_params", "trainable"),
        depth=4,
        verbose=0,
        row_settings=("var_names",),
    )
    tensors = [
        f"{name:<60} {tuple(tensor.shape)!s:<22} {str(tensor.dtype).removeprefix('torch.'):<10} {tensor.nbytes:>12,} bytes"
        for name, tensor in network.state_dict().items()
    ]
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    write_text(path, f"{info}\n\nstate_dict: {len(tensors)} tensors, {size:,} bytes\n" + "\n".join(tensors) + "\n")
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in network.parameters())
    return (
        f"{_count(total)} parameters, {_count(trained)} trained and {_count(total - trained)} frozen at first, "
        f"images of {image_size}x{image_size}"
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 10**5 else f"{number:,}"
