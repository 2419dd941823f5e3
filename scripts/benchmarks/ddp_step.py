"""Overhead of a strategy=ddp step beside the all-reduce of gradients, part by part, in microseconds.

    python scripts/benchmarks/ddp_step.py [rounds]         default: 5

Two processes of one thread each, gloo, the small network of callback_overhead.py (its step is all overhead). In every
round each variant trains an epoch of 150 steps; prints the median over the rounds of the median step. The first variant is
Lightning's DDPStrategy, which in every step waits for a broadcast about signals and broadcasts BatchNorm's buffers. The last
is strategy=ddp.
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from callback_overhead import small_backbone, step_time
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from src.engine.processes.ddp import Ddp
from src.engine.runs.position import PositionCheckpoint, StopOnSignal
from src.engine.steps.out_of_memory import OutOfMemory

STEPS = 150


class NoBroadcastOfSignals(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def stock() -> DDPStrategy:
    return DDPStrategy(cluster_environment=TorchElasticEnvironment(), timeout=timedelta(seconds=60))


def variants(folder: Path) -> dict[str, tuple[Any, list[L.Callback]]]:
    stop = StopOnSignal(PositionCheckpoint(folder))
    return {
        "Lightning's DDPStrategy": (stock(), []),
        "... without its broadcast of signals": (stock(), [NoBroadcastOfSignals()]),
        "... and without buffers (Ddp)": (Ddp(60), [NoBroadcastOfSignals()]),
        "Ddp, StopOnSignal: processes agree on signals": (Ddp(60), [stop]),
        "... and OutOfMemory: and on lack of memory": (Ddp(60), [stop, OutOfMemory("split", 200)]),
    }


def measure(rounds: int, folder: Path) -> None:
    """Runs in each of the two processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    times: dict[str, list[float]] = {name: [] for name in variants(folder)}
    for _ in range(rounds + 1):
        for name, (strategy, callbacks) in variants(folder).items():
            times[name].append(step_time(small_backbone, 8, STEPS, callbacks, devices=2, strategy=strategy))
    if dist.get_rank() == 0:
        first = statistics.median(times["Lightning's DDPStrategy"][1:])
        for name, values in times.items():
            value = statistics.median(values[1:])
            print(f"{name:48} {value:8.0f} us   {value - first:+8.0f}")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        if "RANK" in os.environ:
            measure(rounds, Path(folder))
            return
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(rounds)]
        subprocess.run([sys.executable, *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
