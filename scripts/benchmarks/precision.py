"""Time and memory of a training step in fp32, fp16 and bf16, as a Markdown table.

    python scripts/benchmarks/precision.py [threads]        default: 1

CPU: ResNet18, 32 images of 64 pixels. GPU, if present: ResNet50, 64 images of 224 pixels. The whole network is trained with
AdamW. Each measurement runs in its own process, so that leftover memory does not count; the precisions alternate, and medians
of the rounds are shown. Memory is the peak above the level before the network was built: weights, gradients, optimizer state,
activations and workspaces. As by torch's default, fp32 convolutions may use TF32 on a GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch.nn.functional import cross_entropy

from src.engine.memory.memory import MIB, DeviceMemory
from src.engine.runs.errors import UserError
from src.engine.steps.precision import autocast, check_precision
from src.engine.weights.preprocessing import Preprocessing
from src.models.network import Architecture, build_network

ROUNDS, CLASSES = 3, 10


@dataclass(frozen=True)
class Case:
    """A network, its device and batch, and the number of steps."""

    device: str
    backbone: str
    pixels: int
    batch: int
    warm_up: int
    steps: int


CPU = Case("cpu", "resnet18", 64, 32, warm_up=1, steps=2)  # emulated fp16 takes seconds per step
GPU = Case("cuda", "resnet50", 224, 64, warm_up=5, steps=20)


def measure(case: Case, precision: str, threads: int) -> tuple[float, float]:
    """The median time of a step in milliseconds, and the peak of memory in MiB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(case.device)
    memory = DeviceMemory(device)
    before = memory.held()
    preprocessing = Preprocessing(case.pixels, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    network = build_network(Architecture(case.backbone, "linear", CLASSES), preprocessing).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    images = torch.randint(0, 256, (case.batch, 3, case.pixels, case.pixels), dtype=torch.uint8, device=device)
    labels = torch.randint(0, CLASSES, (case.batch,), device=device)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        with autocast(precision, device):
            logits = network(images)
        scaler.scale(cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(case.warm_up):
        step()
    memory.reset_peak()
    seconds = statistics.median(step() for _ in range(case.steps))
    return 1e3 * seconds, (memory.peak() - before) / MIB


def alone(case: Case, precision: str, threads: int) -> tuple[float, float]:
    """measure, in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, case, precision, threads).result()


def usable(device: str) -> list[str]:
    """The precisions that the device supports."""
    names = []
    for name in ("fp32", "fp16", "bf16"):
        try:
            check_precision(name, torch.device(device))
            names.append(name)
        except UserError as error:
            print(f"{error.found}: {error.why}", file=sys.stderr)
    return names


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    cases = [CPU, GPU] if torch.cuda.is_available() else [CPU]
    print(f"torch {torch.__version__}, {threads} CPU threads, medians of {ROUNDS} rounds\n")
    print("| device | network | precision | ms per step | of fp32 | peak MiB | of fp32 |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        name = torch.cuda.get_device_name() if case.device == "cuda" else "CPU"
        names = usable(case.device)
        rounds = [{precision: alone(case, precision, threads) for precision in names} for _ in range(ROUNDS)]
        fp32_time, fp32_memory = (statistics.median(one["fp32"][place] for one in rounds) for place in (0, 1))
        for precision in names:
            ms, mib = (statistics.median(one[precision][place] for one in rounds) for place in (0, 1))
            network = f"{case.backbone}, {case.batch} x {case.pixels} px"
            print(
                f"| {name} | {network} | {precision} | {ms:.0f} | {ms / fp32_time:.2f} "
                f"| {mib:.0f} | {mib / fp32_memory:.2f} |"
            )


if __name__ == "__main__":
    main()
