"""Draws the explanatory images of docs/multi_gpu.md and docs/model_parallel.md into docs/images/.

    python scripts/figures/concepts.py

Colours mean the same in all of them: blue is weights, yellow is images and activations, red is gradients. Sizes come from the
ResNet50 itself (split.png), the order of operations from the strategies' own code (schedules.png).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from matplotlib.path import Path as Line
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from src.engine.pipeline.stage_threads import Operation, operations, warmup
from src.engine.reports.plots import COLOURS, INK, STYLE
from src.models.model_parallel_resnet50 import ModelParallelResNet50

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"
WIDTH, DPI = 7.0, 150  # inches and dots per inch: 1050 pixels, shown as about 700
UNITS = 14.0  # width of a drawing; a unit is half an inch

WEIGHTS, GRADIENTS, IMAGES = COLOURS
COPY = "#7F9FC4"  # weights copied in every step
PAPER, SHADE, EDGE = "white", "#F3F3F3", "#999999"

LAYERS = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
BAR, PITCH, SQUARE = 0.5, 0.6, 0.5  # width of a layer, distance between layers, side of an image

# A pass of the whole batch through a stage: its duration, its colour, the colour of its number.
PASSES = {"forward": (1, IMAGES, INK), "backward": (2, GRADIENTS, PAPER)}

Point = tuple[float, float]


def drawing(height: float) -> Axes:
    """An empty sheet from (0, 0) to (UNITS, height)."""
    figure = Figure(figsize=(WIDTH, WIDTH * height / UNITS), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, UNITS), ylim=(0, height))
    axes.set_axis_off()
    return axes


def gpu(axes: Axes, at: Point, size: Point, name: str, *, mirrored: bool = False) -> None:
    """A GPU with its name in the upper (mirrored: lower) left corner. at: lower left."""
    _frame(axes, at, size, PAPER, "solid")
    height = at[1] + (0.13 if mirrored else size[1] - 0.13)
    axes.text(at[0] + 0.15, height, name, va="bottom" if mirrored else "top", weight="bold")


def around(axes: Axes, at: Point, size: Point, name: str) -> None:
    """A process or a machine, with its name in the lower left corner."""
    _frame(axes, at, size, SHADE, "dashed")
    axes.text(at[0] + 0.2, at[1] + 0.13, name, va="bottom")


def _frame(axes: Axes, at: Point, size: Point, colour: str, line: str) -> None:
    style = "round,pad=0,rounding_size=0.15"
    axes.add_patch(FancyBboxPatch(at, *size, style, facecolor=colour, edgecolor=EDGE, linestyle=line))


def box(axes: Axes, at: Point, size: Point, text: str) -> None:
    axes.add_patch(Rectangle(at, *size, facecolor=PAPER, edgecolor=INK))
    axes.text(at[0] + size[0] / 2, at[1] + size[1] / 2, text, ha="center", va="center")


def network(
    axes: Axes, at: Point, layers: Sequence[str] = LAYERS, *, replica: bool = False, mirrored: bool = False
) -> None:
    """Optimizer, layers and gradients, or mirrored; a replica has no optimizer. at: lower left; 2.2 high."""
    x, y = at
    state, weights, gradients = (y, y + 0.5, y + 1.95) if mirrored else (y + 1.8, y + 0.4, y)
    if not replica:
        box(axes, (x, state), (len(layers) * PITCH - PITCH + BAR, 0.4), "optimizer")
    for number, name in enumerate(layers):
        left = x + number * PITCH
        axes.add_patch(Rectangle((left, weights), BAR, 1.3, facecolor=COPY if replica else WEIGHTS))
        axes.text(left + BAR / 2, weights + 0.65, name, color=PAPER, rotation=90, ha="center", va="center")
        axes.add_patch(Rectangle((left, gradients), BAR, 0.25, facecolor=GRADIENTS))


def images(axes: Axes, at: Point, numbers: Iterable[int], gap: float = 0) -> None:
    """Numbered squares in rows of two. at: upper left. gap: between rows."""
    for place, number in enumerate(numbers):
        row, column = divmod(place, 2)
        left, bottom = at[0] + column * SQUARE, at[1] - (row + 1) * SQUARE - row * gap
        axes.add_patch(Rectangle((left, bottom), SQUARE, SQUARE, facecolor=IMAGES, edgecolor=PAPER))
        axes.text(left + SQUARE / 2, bottom + SQUARE / 2 - 0.02, str(number), ha="center", va="center")


def arrow(axes: Axes, colour: str, *points: Point, tip: str = "-|>") -> None:
    """An arrow through the points to the last one."""
    axes.add_patch(FancyArrowPatch(path=Line(points), arrowstyle=tip, mutation_scale=14, linewidth=2, color=colour))


def loss(axes: Axes, at: Point, last: float, forward: float, backward: float) -> None:
    """The loss with arrows from and to the last layer at these heights. at: lower left. last: right end of that layer."""
    box(axes, at, (1.2, 1.8), "loss")
    arrow(axes, IMAGES, (last + 0.1, forward), (at[0] - 0.1, forward))
    arrow(axes, GRADIENTS, (at[0] - 0.1, backward), (last + 0.1, backward))


def single() -> Axes:
    """strategy=single: one device has everything."""
    axes = drawing(3.5)
    around(axes, (2.4, 0.1), (11.5, 3.3), "process")
    gpu(axes, (4.2, 0.3), (9.5, 2.9), "GPU 0")
    images(axes, (0.4, 2.6), range(1, 9))
    axes.text(0.9, 2.85, "batch", ha="center")
    network(axes, (6.2, 0.65))
    loss(axes, (11.3, 0.55), 9.7, 1.7, 0.77)
    arrow(axes, IMAGES, (1.5, 1.5), (6.1, 1.5))
    for y, text in ((2.05, "weights"), (0.77, "gradients")):
        axes.text(6.0, y, text, ha="right", va="center")
    return axes


def dp() -> Axes:
    """strategy=dp: one process; the first device holds more than the others."""
    axes = drawing(7.4)
    around(axes, (1.8, 0.1), (12.1, 7.2), "process")
    gpu(axes, (3.2, 4.3), (10.5, 2.8), "GPU 0")
    gpu(axes, (3.2, 0.3), (10.5, 2.8), "GPU 1", mirrored=True)
    images(axes, (0.4, 6.5), range(1, 9))
    axes.text(0.9, 6.75, "batch", ha="center")
    arrow(axes, IMAGES, (1.5, 5.5), (3.6, 5.5))
    images(axes, (3.7, 6.5), range(1, 9))
    images(axes, (3.7, 2.7), range(5, 9))
    network(axes, (6.8, 4.55))
    network(axes, (6.8, 0.65), replica=True, mirrored=True)
    loss(axes, (11.8, 4.45), 10.3, 5.6, 4.67)
    arrow(axes, IMAGES, (4.2, 4.4), (4.2, 2.8))
    arrow(axes, IMAGES, (4.8, 5.9), (6.7, 5.9))
    arrow(axes, IMAGES, (4.8, 2.2), (6.0, 2.2), (6.0, 1.5), (6.7, 1.5))
    arrow(axes, WEIGHTS, (6.7, 5.2), (6.2, 5.2), (6.2, 2.2), (6.7, 2.2))
    arrow(axes, GRADIENTS, (8.55, 2.95), (8.55, 4.45))
    arrow(axes, IMAGES, (10.4, 1.8), (12.4, 1.8), (12.4, 4.35))
    for x, text in ((4.35, "images"), (6.35, "copy of\nthe weights"), (8.7, "gradients"), (12.3, "logits")):
        axes.text(x, 3.7, text, ha="right" if text == "logits" else "left", va="center")
    return axes


def ddp() -> Axes:
    """strategy=ddp: two equal processes."""
    axes = drawing(7.2)
    for rank, bottom in enumerate((3.8, 0.1)):
        mirrored = rank == 1
        around(axes, (1.8, bottom), (12.1, 3.3), f"process {rank}")
        gpu(axes, (3.9, bottom + 0.25), (9.8, 2.8), f"GPU {rank}", mirrored=mirrored)
        network(axes, (6.8, bottom + 0.55), mirrored=mirrored)
        images(axes, (0.4, bottom + 2.4), range(1 + 4 * rank, 5 + 4 * rank))
        arrow(axes, IMAGES, (1.5, bottom + 1.9), (6.7, bottom + 1.9))
        forward, backward = (1.6, 2.4) if mirrored else (1.7, 0.67)
        loss(axes, (11.8, bottom + 0.75), 10.3, bottom + forward, bottom + backward)
    axes.text(0.9, 6.45, "half of\nthe batch", ha="center")
    arrow(axes, GRADIENTS, (8.55, 2.95), (8.55, 4.25), tip="<|-|>")
    axes.text(8.75, 3.6, "gradients, averaged", va="center")
    return axes


def model_parallel() -> Axes:
    """strategy=model_parallel: one process; each device has a part of the network."""
    axes = drawing(3.6)
    around(axes, (1.8, 0.1), (12.1, 3.4), "process")
    _two_stages(axes)
    images(axes, (0.4, 2.7), range(1, 9))
    axes.text(0.9, 2.95, "batch", ha="center")
    arrow(axes, IMAGES, (1.5, 1.7), (3.9, 1.7))
    arrow(axes, IMAGES, (5.8, 1.7), (9.9, 1.7))
    return axes


def pipeline() -> Axes:
    """strategy=pipeline: a process per stage, and several micro-batches in flight."""
    axes = drawing(3.6)
    around(axes, (1.8, 0.1), (4.6, 3.4), "process 0")
    around(axes, (8.1, 0.1), (5.8, 3.4), "process 1")
    _two_stages(axes)
    images(axes, (0.4, 2.3), range(5, 9), gap=0.15)
    axes.text(0.9, 2.5, "micro-\nbatches", ha="center")
    images(axes, (2.75, 1.95), (3, 4))
    images(axes, (8.75, 1.95), (1, 2))
    arrow(axes, IMAGES, (1.5, 1.7), (2.65, 1.7))
    arrow(axes, IMAGES, (5.8, 1.7), (8.65, 1.7))
    return axes


def _two_stages(axes: Axes) -> None:
    gpu(axes, (2.6, 0.5), (3.6, 2.8), "GPU 0")
    gpu(axes, (8.6, 0.5), (5.1, 2.8), "GPU 1")
    network(axes, (4.0, 0.75), LAYERS[:3])
    network(axes, (10.0, 0.75), LAYERS[3:])
    loss(axes, (12.4, 0.65), 11.7, 1.7, 0.87)
    arrow(axes, GRADIENTS, (9.9, 0.87), (5.8, 0.87))
    axes.text(7.25, 1.95, "activations", ha="center")
    axes.text(7.25, 1.12, "gradients", ha="center")


def machines() -> Axes:
    """Ranks on one or two machines with one or four GPUs."""
    axes, typed = drawing(7.1), {"family": "monospace"}
    for x, devices in ((0.3, 1), (5.5, 4)):
        for y, machine in ((5.3, 0), (2.8, 0), (0.6, 1)):
            around(axes, (x, y), (2.0 * devices + 0.2, 1.7), f"machine {machine}")
            for device in range(devices):
                gpu(axes, (x + 0.2 + 2.0 * device, y + 0.5), (1.8, 1.05), f"GPU {device}")
                axes.text(x + 0.35 + 2.0 * device, y + 0.63, f"process {machine * devices + device}", va="bottom")
        axes.plot((x + 1, x + 1), (2.3, 2.8), color=INK, linewidth=2)
        axes.text(x + 1.2, 2.55, "network", va="center")
        several = f" trainer.devices={devices}" if devices > 1 else ""
        axes.text(x, 4.8, f"strategy=ddp{several}" if several else "strategy=single", **typed)
        axes.text(x, 0.1, f"strategy=ddp trainer.num_nodes=2{several}", **typed)
    return axes


def split() -> Axes:
    """How a cut after layer2 divides the weights and activations of a ResNet50."""
    figure = Figure(figsize=(WIDTH, 2.6), facecolor=PAPER, layout="constrained")
    sizes = _resnet50_sizes()
    for kind, axes in enumerate(figure.subplots(1, 2)):
        values = [size[kind] for size in sizes.values()]
        bars = axes.bar(list(sizes), values, color=(WEIGHTS, IMAGES)[kind])
        axes.bar_label(bars, [f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in values])
        axes.axvline(2.5, color=INK, linestyle="dashed")
        axes.set(ylim=(0, 1.3 * max(values)), yticks=[])
        axes.set_title(("weights, MiB", "activations of 32 images, MiB")[kind])
        axes.spines["left"].set_visible(False)
        for middle, device, part in ((1, "GPU 0", values[:3]), (3.5, "GPU 1", values[3:])):
            axes.text(middle, 1.25 * max(values), f"{device}: {sum(part):,.0f}", ha="center", va="top", weight="bold")
    return axes


def _resnet50_sizes() -> dict[str, tuple[float, float]]:
    """{layer: (MiB of weights, MiB of activations kept for the backward pass of 32 images of 224 pixels)}."""
    with torch.device("meta"):  # shapes without data
        model = ModelParallelResNet50(num_classes=10, split_at=("maxpool", "layer1", "layer2", "layer3"))
        x = torch.empty(32, 3, 224, 224)
    sizes = {}
    for name, stage in zip(("stem", "layer1", "layer2", "layer3", "layer4\nhead"), model.stages(), strict=True):
        kept: dict[int, Tensor] = {}  # by storage, which views share
        with saved_tensors_hooks(lambda t, kept=kept: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
            y = stage(x)
        for other in (x, *stage.parameters()):  # the producer of the input keeps it
            kept.pop(other.untyped_storage()._cdata, None)
        weights = sum(parameter.nbytes for parameter in stage.parameters())
        sizes[name] = weights / 2**20, sum(tensor.nbytes for tensor in kept.values()) / 2**20
        x = y.detach()
    return sizes


def schedules() -> Axes:
    """When each of two stages works."""
    figure = Figure(figsize=(WIDTH, 4.4), facecolor=PAPER, layout="constrained")
    rows = figure.subplots(3, sharex=True)
    for axes, (schedule, count) in zip(rows, (("1f1b", 1), ("gpipe", 4), ("1f1b", 4)), strict=True):
        ends = _ends([operations(schedule, 2, stage, count) for stage in range(2)])
        for (stage, (kind, number)), end in ends.items():
            length, colour, ink = PASSES[kind]
            axes.barh(-stage, -length / count, left=end / count, height=0.85, color=colour, edgecolor=PAPER)
            axes.text((end - length / 2) / count, -stage, str(number + 1), color=ink, ha="center", va="center")
        last, most = max(ends.values()) / count, warmup(schedule, 2, 0, count)
        saying = f"{last / 6:.4g} of the time\n\nGPU 0 keeps activations\nof {most} of {count} micro-batches"
        axes.text(last + 0.15, -0.5, saying, va="center")
        axes.set_title(f"strategy.micro_batches={count} strategy.schedule={schedule}", loc="left", family="monospace")
        axes.set(yticks=[0, -1], yticklabels=["GPU 0", "GPU 1"], xlim=(0, 8), xticks=[])
        axes.tick_params(length=0)
    rows[-1].set_xlabel("time")
    handles = [Patch(color=colour, label=f"{kind} pass") for kind, (_, colour, _) in PASSES.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return rows[0]


def _ends(orders: Sequence[Sequence[Operation]]) -> dict[tuple[int, Operation], float]:
    """End of each operation, which begins when its stage is free and its input is there."""

    @cache
    def end(stage: int, operation: Operation) -> float:
        place = orders[stage].index(operation)
        source = stage - 1 if operation[0] == "forward" else stage + 1
        free = end(stage, orders[stage][place - 1]) if place else 0
        given = end(source, operation) if 0 <= source < len(orders) else 0
        return max(free, given) + PASSES[operation[0]][0]

    return {(stage, operation): end(stage, operation) for stage, order in enumerate(orders) for operation in order}


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.titlesize": 9}):
        for draw in (single, dp, ddp, model_parallel, pipeline, machines, split, schedules):
            draw().figure.savefig(FOLDER / f"{draw.__name__}.png", dpi=DPI, metadata={"Software": None})
