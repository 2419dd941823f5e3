"""A command's seconds and memory, and the accuracy of the model that it leaves."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.peers.contestants import ROOT, environment, last_line
from scripts.benchmarks.peers.programs.job import BATCH, CLASSES, MEAN, STD, Job

INTERVAL = 0.25  # seconds between two readings of the memory


@dataclass(frozen=True)
class Cost:
    seconds: float  # from the start of the command to its end
    cpu_seconds: float  # of all its processes
    peak_mib: float  # most proportional set size (PSS) of all its processes together; 0 outside Linux


def measure(command: list[str], threads: int, log: Path) -> Cost:
    """Raises RuntimeError with the last line of its output if the command fails."""
    before = _cpu_seconds_of_children()
    with log.open("w", encoding="utf-8") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(threads), stdout=output, stderr=output, start_new_session=True
        )
        try:
            peak = _watch(process)
            seconds = time.monotonic() - start
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever is left of it, after Ctrl-C too
            process.wait()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {last_line(log.read_text(encoding='utf-8'))}")
    return Cost(seconds, _cpu_seconds_of_children() - before, peak / 2**20)


def _watch(process: subprocess.Popen) -> int:
    """Peak memory in bytes; returns when the process ends."""
    peak = 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=INTERVAL)
            return peak
        peak = max(peak, session_memory(process.pid))


def session_memory(session: int) -> int:
    """PSS in bytes of the processes of a session: a page that several of them share counts once. See proc_pid_smaps(5)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):  # it ended meanwhile, or belongs to somebody else
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()  # state, parent, group, session
            if int(after_name[3]) == session:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def val_accuracy(model: Path, data: Path, job: Job) -> float:
    """Share of the val images that a saved model gets right. model: a state dict of resnet18, or this project's weights."""
    import torch  # takes seconds
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.models import resnet18
    from torchvision.transforms import v2

    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    images = ImageFolder(data / "val", v2.Compose([v2.Resize(job.size), v2.CenterCrop(job.size), *to_float]))
    network = resnet18(num_classes=CLASSES).eval()
    network.load_state_dict(_torchvision_state(model))
    with torch.inference_mode():
        hits = sum(int((network(batch).argmax(1) == labels).sum()) for batch, labels in DataLoader(images, BATCH))
    return hits / len(images)


def _torchvision_state(model: Path) -> dict:
    """The tensors by torchvision's names. This project calls them backbone.* and head.*."""
    import torch

    if model.suffix == ".pt":
        return torch.load(model, weights_only=True)
    from safetensors.torch import load_file

    names = {"backbone": "", "head": "fc."}
    parts = ((name.partition("."), tensor) for name, tensor in load_file(model).items())
    return {names[part] + rest: tensor for (part, _, rest), tensor in parts}
