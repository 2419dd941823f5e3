"""A process of src.doctor that has torch: the devices that it sees, and whether it reaches the other processes.

Started by src/engine/doctor/processes.py, so that a driver or a network that hangs can be left. Rank 0 prints a line of JSON
for each of the two.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from src.engine.memory.gpu_driver import Driver
from src.engine.processes.launching import STORE
from src.engine.steps.precision import cpu_has_bf16


def devices() -> dict[str, Any]:
    """What torch knows of this machine."""
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda_build": torch.version.cuda, "bf16": cpu_has_bf16()}
    facts |= {"threads": torch.get_num_threads(), "mps": torch.backends.mps.is_available(), "gpus": []}
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        name, others = torch.cuda.get_device_name(number), Driver(torch.device("cuda", number)).read().other_processes
        facts["gpus"].append({"name": name, "free": free, "total": total, "others": others})
    return facts


def driver() -> str | None:
    """The version of NVIDIA's driver and the newest CUDA that it knows; None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        return f"{pynvml.nvmlSystemGetDriverVersion()}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
    except pynvml.NVMLError:
        return None


def round_trip(backend: str, rank: int, world: int, seconds: float) -> float:
    """The seconds of a sum over all ranks, after they have met. Raises RuntimeError."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    meeting, limit = Path(os.environ[STORE]).as_uri(), timedelta(seconds=seconds)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=limit)
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)  # makes the connections
    start = time.perf_counter()
    dist.all_reduce(ones)
    if ones.item() != world**2:
        raise RuntimeError(f"a sum of {world} processes came out as {ones.item():g}")
    return time.perf_counter() - start


def main(rank: int, world: int, accelerator: str, seconds: float) -> None:
    facts = devices() | {"driver": driver()} if rank == 0 else {}
    on_gpus = accelerator in ("auto", "gpu") and torch.cuda.is_available() and torch.cuda.device_count() >= world
    backend = "nccl" if on_gpus else "gloo"
    if rank == 0:
        import torchvision  # noqa: F401 - built for another torch it cannot be imported

        print(json.dumps(facts), flush=True)
    taken = round_trip(backend, rank, world, seconds)
    if rank == 0:
        print(json.dumps({"backend": backend, "milliseconds": 1000 * taken}), flush=True)
    sys.stderr.flush()
    os._exit(0)  # tidying up NCCL can hang


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
