"""Times strategy=pipeline's stages against the unsplit ResNet50, and draws when each stage works.

    python scripts/benchmarks/pipeline.py [cut [pixels]]   default: the quickest of CUTS for each memory layout, 128

Two processes with one thread each train on random images on the CPU, so it needs two idle cores. Steps with one stage per
process alternate with steps of the whole network in the first process while the second waits. A time is the median of ROUNDS
steps (forward and backward, no optimizer). Prints a table per memory layout: channels_last, the default, speeds up the unsplit
network more than small micro-batches. Draws one step of each schedule in docs/images/pipeline_timeline.png.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from src.engine.pipeline import pipeline
from src.engine.pipeline.pipeline_stage import LocalStage
from src.engine.reports.plots import COLOURS
from src.engine.weights.preprocessing import Preprocessing
from src.models.model_parallel_resnet50 import ModelParallelResNet50
from src.models.network import TransferNetwork

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, CLASSES = 16, 10
SIZE = int(sys.argv[2]) if len(sys.argv) > 2 else 128
MICRO_BATCHES = (1, 2, 4, 8)
CUTS = ("layer2", "layer3.0", "layer3.1", "layer3.2")
ROUNDS, TRIES = 5, 3
SHOWN = 4  # micro-batches in the image
IMAGE = Path(__file__).parents[2] / "docs" / "images" / "pipeline_timeline.png"

Event = tuple[str, int, float, float]  # "forward" or "backward", which micro-batch, start, end (seconds)


class TracedStage(PipelineStage):
    """Records when it computes, without the waiting. time.monotonic is the same in all processes."""

    events: list[Event]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        return self._timed("forward", fwd_chunk_id, super().forward_one_chunk, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        return self._timed("backward", bwd_chunk_id, super().backward_one_chunk, *args, **kwargs)

    def _timed(self, kind: str, part: int, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        result = compute(part, *args, **kwargs)
        TracedStage.events.append((kind, part, start, time.monotonic()))
        return result


def build_network(cut: str, channels_last: bool) -> TransferNetwork:
    """A network in training mode, with the same random weights at every call."""
    torch.manual_seed(0)
    backbone = ModelParallelResNet50(split_at=[cut])
    backbone.fc = nn.Identity()
    square = Preprocessing(SIZE, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    return TransferNetwork(backbone, nn.Linear(2048, CLASSES), square, channels_last=channels_last).train()


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Contribution of these labels to the mean over the batch."""
    return nn.functional.cross_entropy(logits, labels) * (len(labels) / BATCH)


class Contest:
    """Times a batch through the stages of all processes, and through the whole network in the first."""

    def __init__(self, rank: int, cut: str, channels_last: bool) -> None:
        self.rank = rank
        self.whole, self.split = build_network(cut, channels_last), build_network(cut, channels_last)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        self._stages: dict[tuple[int, str], LocalStage] = {}

    def unsplit(self, micro_batches: int) -> float:
        """Seconds."""

        def work() -> None:
            if self.rank == 0:
                for images, labels in zip(
                    self.images.chunk(micro_batches), self.labels.chunk(micro_batches), strict=True
                ):
                    loss(self.whole(images), labels).backward()

        return self._timed(self.whole, work)

    def stages(self, micro_batches: int, schedule: str = "1f1b") -> float:
        """Seconds."""
        key = micro_batches, schedule
        if key not in self._stages:
            self._stages[key] = LocalStage(self.split, torch.device("cpu"), micro_batches, schedule, loss, nullcontext)
        return self._timed(self.split, lambda: self._stages[key].forward_backward(self.images, self.labels))

    def _timed(self, network: nn.Module, work: Callable[[], None]) -> float:
        network.zero_grad()
        dist.barrier()
        start = time.monotonic()
        work()
        dist.barrier()
        return time.monotonic() - start


def median(work: Callable[[], float], times: int) -> float:
    """Median over this many calls, after a warm-up call."""
    work()
    return statistics.median(work() for _ in range(times))


def choose_cut(rank: int, channels_last: bool) -> str:
    """The fastest cut with the most micro-batches, as rank 0 measures it; prints all times."""
    seconds = {}
    for cut in CUTS:
        contest = Contest(rank, cut, channels_last)
        seconds[cut] = median(lambda contest=contest: contest.stages(MICRO_BATCHES[-1]), TRIES)
    if rank == 0:
        shown = ", ".join(f"{cut} {value:.2f} s" for cut, value in seconds.items())
        print(f"1F1B with {MICRO_BATCHES[-1]} micro-batches, cut after: {shown}", flush=True)
    best = [min(seconds, key=seconds.__getitem__)]
    dist.broadcast_object_list(best)
    return best[0]


def compare(contest: Contest) -> None:
    """Prints a row for each number of micro-batches."""
    runs = [(kind, m) for m in MICRO_BATCHES for kind in (contest.unsplit, contest.stages)]
    times: dict[Any, list[float]] = {run: [] for run in runs}
    for _ in range(ROUNDS + 1):
        for kind, m in runs:
            times[kind, m].append(kind(m))
    if contest.rank == 0:
        print("| micro-batches | unsplit, s | stages, s | stages / unsplit | stages / unsplit whole batch |")
        print("|---|---|---|---|---|")
        seconds = {run: statistics.median(values[1:]) for run, values in times.items()}
        for m in MICRO_BATCHES:
            whole, alone, together = (
                seconds[contest.unsplit, 1],
                seconds[contest.unsplit, m],
                seconds[contest.stages, m],
            )
            print(f"| {m} | {alone:.2f} | {together:.2f} | {together / alone:.2f} | {together / whole:.2f} |")


def traced(contest: Contest, schedule: str) -> list[list[Event]]:
    """Events of each stage in the fastest of several steps, in seconds since its first event."""
    pipeline.PipelineStage = TracedStage
    best: tuple[float, list[list[Event]]] = (float("inf"), [])
    for number in range(TRIES + 1):
        TracedStage.events = []
        seconds = contest.stages(SHOWN, schedule)
        stages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(stages, TracedStage.events)
        if number > 0:
            best = min(best, (seconds, stages))
    begin = min(start for stage in best[1] for _, _, start, _ in stage)
    return [[(kind, part, start - begin, end - begin) for kind, part, start, end in stage] for stage in best[1]]


def draw(traces: dict[str, list[list[Event]]], cut: str) -> None:
    """A row per stage and a box per micro-batch; white is idle time."""
    colours = {"forward": COLOURS[2], "backward": COLOURS[1]}  # as in scripts/figures/concepts.py
    texts = {"forward": "black", "backward": "white"}
    length = max(event[3] for stages in traces.values() for stage in stages for event in stage)
    figure, axes = plt.subplots(len(traces), 1, figsize=(10.5, 4.6), sharex=True, layout="constrained")
    for axis, (schedule, stages) in zip(axes, traces.items(), strict=True):
        end = max(event[3] for stage in stages for event in stage)
        for row, stage in enumerate(stages):
            for kind, part, start, stop in stage:
                axis.barh(row, stop - start, 0.72, left=start, color=colours[kind], edgecolor="#444444", linewidth=0.8)
                axis.text((start + stop) / 2, row, part + 1, ha="center", va="center", fontsize=11, color=texts[kind])
            idle = 1 - sum(stop - start for _, _, start, stop in stage) / end
            axis.text(length * 1.01, row, f"idle {idle:.0%}", va="center", fontsize=10)
        axis.axvline(end, color="#888888", linewidth=1, linestyle="--")
        axis.set_title(f"{schedule}: {end:.2f} s", loc="left", fontsize=12)
        axis.set_yticks(range(len(stages)), [f"stage {row + 1}" for row in range(len(stages))], fontsize=11)
        axis.invert_yaxis()
        axis.set_xlim(0, length * 1.09)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds since the start of the step", fontsize=11)
    boxes = [plt.Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor="#444444") for colour in colours.values()]
    figure.legend(boxes, colours, loc="outside upper right", ncols=2, frameon=False, fontsize=11)
    figure.suptitle(
        f"One training step of a ResNet50 cut after {cut}, {SHOWN} micro-batches of {BATCH // SHOWN} images "
        f"({SIZE} px),\ntwo processes of one CPU thread: boxes are micro-batches, white is waiting",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=100)


def work(rank: int, port: int, cut: str | None) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    if rank == 0:
        print(f"batch of {BATCH} images of {SIZE} px, one thread per process, torch {torch.__version__}")
    for channels_last in (False, True):
        chosen = cut or choose_cut(rank, channels_last)
        if rank == 0:
            print(f"\n{'channels_last' if channels_last else 'contiguous'}, cut after {chosen}\n")
        compare(Contest(rank, chosen, channels_last))
    contest = Contest(rank, chosen, channels_last)
    traces = {name: traced(contest, schedule) for name, schedule in (("GPipe", "gpipe"), ("1F1B", "1f1b"))}
    if rank == 0:
        draw(traces, chosen)
        print(f"the image is {IMAGE}")
    dist.destroy_process_group()


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.spawn(work, (port, sys.argv[1] if len(sys.argv) > 1 else None), nprocs=2)


if __name__ == "__main__":
    main()
