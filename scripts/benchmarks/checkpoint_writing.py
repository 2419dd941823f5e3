"""How long a checkpoint takes to write, how long the training step waits, and what kill -9 leaves of the file.

    python scripts/benchmarks/checkpoint_writing.py [kills]         default: 20; 0 measures the times only

The checkpoint is a ResNet50 with the state of AdamW (293 MiB). Compares four writers in turns, medians of 5 rounds, one
thread: this project's in the background and waiting, Lightning's TorchCheckpointIO and AsyncCheckpointIO. Then a process that
writes checkpoints in a loop, with the temporary folder on another file system (/dev/shm), is killed at a random moment of a
write, and the file is checked.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from src.engine.runs import seeding
from src.engine.runs.reading import newest_position
from src.engine.runs.writing import DurableCheckpointIO

ROUNDS = 5
WAYS = {
    "ours, in the background": lambda: DurableCheckpointIO(),
    "ours, waiting": lambda: DurableCheckpointIO(background=False),
    "Lightning, waiting": lambda: TorchCheckpointIO(),
    "Lightning, AsyncCheckpointIO": lambda: AsyncCheckpointIO(TorchCheckpointIO()),
}
KILLED = ("ours, in the background", "Lightning, waiting")


def checkpoint() -> dict[str, Any]:
    network = torchvision.models.resnet50()
    optimizer = torch.optim.AdamW(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"state_dict": network.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def measure_times(folder: Path) -> None:
    saved = checkpoint()
    step = torch.nn.Conv2d(64, 64, 3)
    images = torch.randn(8, 64, 56, 56)
    print(f"{'way':30} {'step waits ms':>14} {'until on disk ms':>17} {'steps meanwhile, times as slow':>31}")
    waits: dict[str, list[float]] = {way: [] for way in WAYS}
    writes: dict[str, list[float]] = {way: [] for way in WAYS}
    slower: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS + 1):
        for way, build in WAYS.items():
            io = build()
            alone = statistics.median(one_step(step, images) for _ in range(9))
            start = time.perf_counter()
            io.save_checkpoint(saved, folder / "last.ckpt")
            waits[way].append(1000 * (time.perf_counter() - start))
            slower[way].append(statistics.median(one_step(step, images) for _ in range(9)) / alone)
            io.teardown()
            writes[way].append(1000 * (time.perf_counter() - start))
    for way in WAYS:
        wait, write, slow = (statistics.median(values[way][1:]) for values in (waits, writes, slower))
        print(f"{way:30} {wait:14.0f} {write:17.0f} {slow if 'waiting' not in way else 1:31.2f}")


def one_step(layer: torch.nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    layer(images).sum().backward()
    return time.perf_counter() - start


def write_for_ever(way: str, path: str) -> None:
    """Main loop of the process that is killed. Prints a dot before each write."""
    io, saved = WAYS[way](), checkpoint()
    while True:
        print(".", flush=True)
        io.save_checkpoint(saved, path)
        io.teardown()


def count_damage(way: str, kills: int, folder: Path) -> tuple[int, int]:
    """Number of kills after which the checkpoint was damaged or missing, and MiB of leftover files."""
    damaged, left = 0, 0
    temporary = Path(tempfile.mkdtemp(dir="/dev/shm"))
    for number in range(kills):
        path = folder / "last.ckpt"
        process = subprocess.Popen(
            [sys.executable, __file__, "write", way, str(path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        )
        process.stdout.readline()  # the first write begins
        start = time.perf_counter()
        process.stdout.readline()  # the second begins
        whole = time.perf_counter() - start
        process.stdout.readline()
        fraction = torch.rand((), generator=seeding.generator("kill", number)).item()
        time.sleep(fraction * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        damaged += not can_be_read(path, ours=way.startswith("ours"))
        kept = (path, path.with_name("previous.ckpt"))
        leftovers = [file for place in (folder, temporary) for file in place.iterdir() if file not in kept]
        left = max(left, sum(file.stat().st_size for file in leftovers) // 2**20)
        for file in [*leftovers, *folder.iterdir()]:
            file.unlink(missing_ok=True)
    shutil.rmtree(temporary)
    return damaged, left


def can_be_read(path: Path, ours: bool) -> bool:
    """Reads ours as a continued run does, Lightning's by torch.load."""
    try:
        position = newest_position(path.parent) if ours else path
        torch.load(position, weights_only=True)
        return True
    except Exception:  # torch raises many types for a damaged file
        return False


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        write_for_ever(sys.argv[2], sys.argv[3])
    torch.set_num_threads(1)
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        measure_times(Path(folder))
        if kills:
            print(f"\n{'way':30} {'damaged or gone':>16} {'left behind, MiB':>17}    of {kills} kills")
        for way in KILLED if kills else ():
            damaged, left = count_damage(way, kills, Path(folder))
            print(f"{way:30} {damaged:16d} {left:17d}")


if __name__ == "__main__":
    main()
