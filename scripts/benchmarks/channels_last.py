"""Ratio of the time of a pass with model.channels_last=true to false: below 1, channels_last is faster.

    python scripts/benchmarks/channels_last.py [backbone ...]       default: efficientnet_lite0 resnet18

One process, the two alternating, medians of 7 rounds, all cores; 32 images of 64 and of 224 pixels.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from src.engine.steps.precision import autocast, cpu_has_bf16
from src.engine.weights.preprocessing import Preprocessing
from src.models.network import Architecture, TransferNetwork, build_network

ROUNDS = 7


def seconds(network: TransferNetwork, images: torch.Tensor, precision: str, train: bool) -> float:
    """Time of a forward pass (eval) or of a forward and a backward pass (train)."""
    network.train(train)
    start = time.perf_counter()
    with torch.set_grad_enabled(train), autocast(precision, images.device):
        logits = network(images)
    if train:
        logits.float().square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    precisions = ["fp32", "bf16"] if cpu_has_bf16() else ["fp32"]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'backbone':20} {'pixels':>6} {'precision':>9} {'pass':>6} {'false ms':>9} {'true ms':>8} {'ratio':>6}")
    for name in sys.argv[1:] or ["efficientnet_lite0", "resnet18"]:
        for size in (64, 224):
            preprocessing = Preprocessing(size, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
            architecture = Architecture(name, "linear", 10)
            networks = [build_network(architecture, preprocessing, channels_last=last) for last in (False, True)]
            images = torch.randint(0, 256, (32, 3, size, size), dtype=torch.uint8)
            for precision in precisions:
                for train in (False, True):
                    times: list[list[float]] = [[], []]
                    for _ in range(ROUNDS + 1):
                        for network, measured in zip(networks, times, strict=True):
                            measured.append(seconds(network, images, precision, train))
                    false, true = (1000 * statistics.median(measured[1:]) for measured in times)
                    kind = "train" if train else "eval"
                    print(f"{name:20} {size:>6} {precision:>9} {kind:>6} {false:9.0f} {true:8.0f} {true / false:6.2f}")


if __name__ == "__main__":
    main()
