"""Memory and time of a training step of ViT-B/16: full fine-tuning, the head alone, and adapters (docs/memory.md).

    python scripts/benchmarks/lora.py [batch size [image size]]       default: 8 224; takes five minutes and 4 GB

A process for each row, one thread, AdamW, fp32. Time is the CPU's, in which other programs do not count. The peak is that of
the process's resident memory in three steps, less what it held before the network was built.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch

from src.config import Freeze, Optimizer
from src.engine.memory import ram
from src.engine.memory.gradient_checkpoints import checkpoint_gradients
from src.engine.weights.low_rank import add_adapters
from src.engine.weights.preprocessing import Preprocessing
from src.models.backbones import blocks
from src.models.freezing import FreezePlan
from src.models.network import Architecture, build_network
from src.models.optimizers import build_optimizer

STEPS = 3
ROWS = {  # what learns, with memory.checkpoint_gradients or without
    "everything": (Freeze(preset="full"), False),
    "everything, activations computed twice": (Freeze(preset="full"), True),
    "head": (Freeze(preset="head_only"), False),
    "head and adapters of rank 8": (Freeze(lora_rank=8), False),
    "head and adapters, activations computed twice": (Freeze(lora_rank=8), True),
}


def measure(freeze: Freeze, checkpoints: bool, batch_size: int, image_size: int) -> str:
    """The weights that learn, the peak and the time of a step."""
    torch.set_num_threads(1)
    torch.zeros(8, 8).matmul(torch.zeros(8, 8))
    before = ram.resident_bytes() or 0
    preprocessing = Preprocessing(image_size, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    network = build_network(Architecture("vit_b_16", "linear", 10), preprocessing)
    if checkpoints:
        checkpoint_gradients(network.backbone, blocks(network.backbone))
    add_adapters(network.backbone, freeze.lora_rank, seed=0)
    FreezePlan.of(freeze, network.backbone, 1).apply(network, 0)
    optimizer = build_optimizer(network, Optimizer(name="adamw", lr=1e-4))
    images = torch.randint(256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)
    labels = torch.arange(batch_size) % 10
    ram.reset_resident_peak()
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
    learns = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return (
        f"{learns / 1e6:8.2f} M {(ram.resident_peak() - before) / 2**20:8,.0f} MiB {statistics.median(seconds):6.1f} s"
    )


def main() -> None:
    sizes = [int(word) for word in sys.argv[1:3]]
    batch_size, image_size = sizes + [8, 224][len(sizes) :]
    if len(sys.argv) == 4:
        print(measure(*ROWS[sys.argv[3]], batch_size, image_size))
        return
    for name in ROWS:
        command = [sys.executable, __file__, str(batch_size), str(image_size), name]
        print(
            f"{name:46} {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
