"""Says once when every step keeps some memory: how much, how long that can last, and which attribute holds it.

The usual cause is one line in a training loop, `self.total_loss += loss`, which keeps the graphs of all steps. The memory
that is alive at one fixed point of a step is the same in every step of a healthy loop. So it is read there: on a GPU by
its allocator, and always in RAM, where graphs are made. When it keeps rising, the attributes of the model, the callbacks
and the data are looked at twice, and those that hold more than before are named. docs/memory.md, "Growing memory".
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.multiprocessing.reductions import shared_cache

from src.callbacks.memory_holders import Holder, find_holders
from src.memory import available_bytes, live_bytes, read_allocator

log = logging.getLogger(__name__)

WARM_UP = 15  # first steps of an epoch, which say nothing: optimizer state and caches come into being
WINDOW = 40  # rises that make a verdict
FALLS = 2  # how many of the window's steps may bring no rise: 5 %
EVERY_STEP, THEN_EVERY = 1000, 10  # a reading takes about 0.2 ms; after so many steps only every tenth has one
SHOWN = 6  # holders that are named

Reading = tuple[int, int]  # what is compared (on a GPU pieces of memory, since sizes of batches differ), bytes


class Rises:
    """Whether the readings of one kind of memory keep rising."""

    def __init__(self) -> None:
        self.gains: list[tuple[int, int, bool]] = []  # steps since the last reading, bytes since then, whether it rose
        self.first_look: dict[str, Holder] = {}  # what was held in the middle of the window
        self._last: tuple[int, Reading] | None = None

    def break_off(self) -> None:
        """Between this reading and the next a level may change: an epoch ends, other blocks are trained."""
        self._last = None

    def add(self, step: int, reading: Reading) -> None:
        if self._last is not None:
            last_step, last = self._last
            self.gains.append((step - last_step, reading[1] - last[1], reading > last))
            if sum(not rose for _, _, rose in self.gains) > FALLS:
                self.gains.clear()
        self._last = (step, reading)

    def bytes_per_step(self) -> float | None:
        """The Theil-Sen slope: the median over all pairs of readings, which a single jump does not move.

        None if the later reading is the higher one in fewer than 80 % of the pairs: something is emptied now and then.
        """
        gaps, gains, _ = zip(*self.gains, strict=True)
        steps, level = np.cumsum((0, *gaps)), np.cumsum((0, *gains))
        one, other = np.triu_indices(len(steps), 1)
        slopes = (level[other] - level[one]) / (steps[other] - steps[one])
        return float(np.median(slopes)) if np.quantile(slopes, 0.2) > 0 else None


@dataclass
class Loop:
    """What is known about one loop: training, or validation."""

    unit: str  # what it repeats
    rises: dict[torch.device, Rises] = field(default_factory=dict)  # of each kind of memory; none: not watched any more
    steps: int = 0
    warm_up: int = 0  # how many of the next steps say nothing
    suspects: dict[str, Holder] = field(default_factory=dict)  # may be emptied when the epoch is over
    warning: str = ""  # to be given if they are not
    acquitted: set[str] = field(default_factory=set)  # they were


class MemoryGrowth(L.Callback):
    """Watches training and validation, and warns at most once of each.

    Values that are collected in an epoch and dropped at its end grow as well, and are meant. They are reported only if they
    keep graphs, if memory would not last until the end of the epoch, or if they are still there when the next one begins
    or training ends.
    """

    def __init__(self) -> None:
        self._training, self._validation = Loop("training step"), Loop("validation batch")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kinds = dict.fromkeys((trainer.strategy.root_device, torch.device("cpu")))
        for loop in (self._training, self._validation):
            loop.rises = {kind: Rises() for kind in kinds if live_bytes(kind) is not None}
        if not self._training.rises:
            log.debug("Growing memory is not looked for: the C library of this platform cannot tell what is in use.")
        self._begin(self._training, trainer.num_training_batches)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(self._training, trainer.num_training_batches)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(self._validation, sum(trainer.num_val_batches))

    def _begin(self, loop: Loop, steps: int) -> None:
        """A new epoch. Short epochs are strung together: their rises count, what lies between them does not."""
        loop.warm_up = min(WARM_UP, steps // 2)
        for rises in loop.rises.values():
            rises.break_off()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._look(self._training, trainer, batch_idx, trainer.num_training_batches)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._look(self._validation, trainer, batch_idx, sum(trainer.num_val_batches))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for loop in (self._training, self._validation):
            _try_suspects(loop, trainer)

    def _look(self, loop: Loop, trainer: L.Trainer, batch_idx: int, batches: int) -> None:
        if batch_idx == 0:
            _try_suspects(loop, trainer)
        loop.steps += 1
        loop.warm_up -= 1
        due = loop.steps <= EVERY_STEP or loop.steps % THEN_EVERY == 0
        if not due or loop.warm_up >= 0 or not loop.rises:
            return
        _drop_garbage()
        for kind, rises in loop.rises.items():
            rises.add(loop.steps, _read(kind))
            if len(rises.gains) == WINDOW // 2:
                rises.first_look = find_holders(_roots(trainer))
            elif len(rises.gains) == WINDOW:
                _judge(loop, kind, trainer, batches - batch_idx)
                break


def _judge(loop: Loop, kind: torch.device, trainer: L.Trainer, steps_left: int) -> None:
    """Memory rose in the whole window: says so, or leaves it in doubt until the epoch is over."""
    rises = loop.rises[kind]
    speed, before = rises.bytes_per_step(), rises.first_look
    rises.gains.clear()
    found = find_holders(_roots(trainer))
    grown = {name: holder for name, holder in found.items() if holder.grew_since(before.get(name))}
    if speed is None or (grown and grown.keys() <= loop.acquitted):
        return
    available = available_bytes(kind)
    lasts = None if available is None else int(available / speed)
    graphs = {name: holder for name, holder in grown.items() if holder.operations}
    warning = describe(loop.unit, kind, speed, lasts, graphs or grown, before)
    if graphs or not grown or (lasts is not None and lasts < steps_left):
        _warn(loop, warning)
    else:
        loop.suspects, loop.warning = grown, warning


def _try_suspects(loop: Loop, trainer: L.Trainer) -> None:
    """The epoch is over: warns if what was collected in it is still there."""
    if not loop.suspects:
        return
    now = find_holders(_roots(trainer))
    if any(name in now and now[name].bytes >= holder.bytes for name, holder in loop.suspects.items()):
        _warn(loop, loop.warning)
    loop.acquitted |= loop.suspects.keys()
    loop.suspects = {}


def _warn(loop: Loop, warning: str) -> None:
    log.warning(warning)
    loop.rises = {}


def _roots(trainer: L.Trainer) -> list[Any]:
    return [trainer.lightning_module, *trainer.callbacks, trainer.datamodule]


def _drop_garbage() -> None:
    """Frees what would be freed by and by, and looks like growth until then.

    Lightning's steps make reference cycles, which Python collects every few dozen steps; of batches from loader processes
    torch keeps a handle for up to 64 batches.
    """
    gc.collect(1)
    with shared_cache.lock:
        shared_cache.free_dead_references()


def _read(kind: torch.device) -> Reading:
    if kind.type == "cuda":
        allocator = read_allocator(kind)
        return allocator.allocations, allocator.allocated
    live = live_bytes(kind)
    return live, live


def describe(
    unit: str,
    kind: torch.device,
    bytes_per_step: float,
    lasts: int | None,
    grown: dict[str, Holder],
    before: dict[str, Holder],
) -> str:
    """The warning: what happens, how long it can last (steps), what probably holds the memory, what to do."""
    place = "RAM" if kind.type == "cpu" else "the GPU"
    lines = [f"Memory grows: every {unit} keeps {size(bytes_per_step)} more in {place}."]
    if lasts is not None:
        lines.append(f"What is free lasts for about {lasts:,} more of them.")
    ranked = sorted(grown.items(), key=lambda item: (item[1].operations, item[1].bytes), reverse=True)
    for name, holder in ranked[:SHOWN]:
        earlier = f" (earlier: {_content(before[name])})" if name in before else ""
        lines.append(f"  - {name}: {_content(holder)}{earlier}")
    if not grown:
        lines.append("No attribute of the model, the callbacks or the data holds it: look at globals and closures.")
    if not grown or ranked[0][1].operations:
        lines.append("A graph keeps all that it was made from. Keep numbers: loss.item(), or tensors: loss.detach().")
        lines.append("Put what is only looked at, such as a validation of your own, into `with torch.no_grad():`.")
    if not grown or not ranked[0][1].operations:
        lines.append("Empty what you collect when the epoch is over (outputs.clear(), del), or keep only sums of it.")
    lines.append("More: docs/memory.md, Growing memory")
    return "\n  ".join(lines)


def _content(holder: Holder) -> str:
    """57 tensors, 1.2 MiB, a graph of 9,361 operations"""
    tensors = f"{holder.tensors} tensor{'s' * (holder.tensors != 1)}, {size(holder.bytes)}"
    return tensors + (f", a graph of {holder.operations:,} operations" if holder.operations else "")


def size(count: float) -> str:
    """A number of bytes for people: 812 B, 7.2 KiB, 1.2 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
