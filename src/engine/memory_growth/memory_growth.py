"""Warns once if every step keeps some memory: how much, how long that can last, and which attribute holds it.

The usual cause is one line in a training loop, `self.total_loss += loss`, which keeps the graphs of all steps. A healthy
loop has the same live memory at the same point of every step. It is read there: on the GPU, and always in RAM, where
graphs are. If it keeps rising, the attributes of the model, the callbacks and the data are searched twice, and those that
hold more than before are named. docs/memory.md, "Growing memory".
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

from src.engine.memory.memory import available_bytes, live_bytes, read_allocator
from src.engine.memory_growth.memory_holders import Holder, find_holders

log = logging.getLogger(__name__)

WARM_UP = 15  # first steps of an epoch, not compared: optimizer state and caches are being allocated
WINDOW = 40  # readings for a verdict
MOST_FALLS = 2  # readings of the window that may not rise: 5 %
EVERY_STEP, THEN_EVERY = 1000, 10  # a reading takes about 0.2 ms: after 1000 steps only every tenth step has one
MOST_NAMED = 6  # holders in the warning

# (level, bytes). `level` must not keep rising: live allocations on a GPU, whose bytes vary with the batch; bytes in RAM.
Reading = tuple[int, int]


class Rises:
    """Whether the readings of one kind of memory keep rising."""

    def __init__(self) -> None:
        self.gains: list[tuple[int, int, bool]] = []  # since the last reading: steps, bytes, whether the level rose
        self.first_look: dict[str, Holder] = {}  # the holders in the middle of the window
        self._last: tuple[int, Reading] | None = None

    def break_off(self) -> None:
        """Ends a series of readings: the level may change between two epochs, when other blocks are trained."""
        self._last = None

    def add(self, step: int, reading: Reading) -> None:
        if self._last is not None:
            last_step, last = self._last
            self.gains.append((step - last_step, reading[1] - last[1], reading > last))
            if sum(not rose for _, _, rose in self.gains) > MOST_FALLS:
                self.gains.clear()
        self._last = (step, reading)

    def bytes_per_step(self) -> float | None:
        """The Theil-Sen slope: the median over all pairs of readings, which a single jump does not move.

        None if the later reading is higher in fewer than 80 % of the pairs, as with a buffer that is emptied now and then.
        """
        gaps, gains, _ = zip(*self.gains, strict=True)
        steps, level = np.cumsum((0, *gaps)), np.cumsum((0, *gains))
        earlier, later = np.triu_indices(len(steps), 1)
        slopes = (level[later] - level[earlier]) / (steps[later] - steps[earlier])
        return float(np.median(slopes)) if np.quantile(slopes, 0.2) > 0 else None


@dataclass
class Loop:
    """The state of the watch over training or validation."""

    unit: str  # what the loop repeats, for the warning
    rises: dict[torch.device, Rises] = field(default_factory=dict)  # by kind of memory; empty: no longer watched
    steps: int = 0
    warm_up: int = 0  # steps that are still not compared
    suspects: dict[str, Holder] = field(default_factory=dict)  # growing holders that may be emptied at the epoch's end
    warning: str = ""  # given if they are not
    acquitted: set[str] = field(default_factory=set)  # former suspects that were emptied


class MemoryGrowth(L.Callback):
    """Watches training and validation, and warns at most once of each.

    Values that are collected in an epoch and dropped at its end grow as well, on purpose. They are reported only if they
    keep graphs, if memory would not last until the end of the epoch, or if they remain when the next epoch begins or
    training ends.
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

    def _begin(self, loop: Loop, steps: float) -> None:
        """Begins an epoch. Rises within short epochs add up; a change between two epochs does not count."""
        loop.warm_up = int(min(WARM_UP, steps // 2))
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

    def _look(self, loop: Loop, trainer: L.Trainer, batch_idx: int, batches: float) -> None:
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


def _judge(loop: Loop, kind: torch.device, trainer: L.Trainer, steps_left: float) -> None:
    """Called when memory rose in the whole window: warns, or makes the holders suspects until the epoch is over."""
    rises = loop.rises[kind]
    speed, before = rises.bytes_per_step(), rises.first_look
    rises.gains.clear()
    holders = find_holders(_roots(trainer))
    grown = {name: holder for name, holder in holders.items() if holder.grew_since(before.get(name))}
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
    """Called when the epoch is over: warns if the suspects still hold what was collected."""
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
    """Frees what looks like growth but will be freed: reference cycles of Lightning's steps, which Python collects every few
    dozen steps, and torch's handles of up to 64 batches from loader processes."""
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
    """The warning: the growth, how many steps it can last, which holders grew, what to do."""
    place = "RAM" if kind.type == "cpu" else "the GPU"
    lines = [f"Memory grows: every {unit} keeps {size(bytes_per_step)} more in {place}."]
    if lasts is not None:
        lines.append(f"What is free lasts for about {lasts:,} more of them.")
    ranked = sorted(grown.items(), key=lambda item: (item[1].operations, item[1].bytes), reverse=True)
    for name, holder in ranked[:MOST_NAMED]:
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
    text = "1 tensor" if holder.tensors == 1 else f"{holder.tensors} tensors"
    text += f", {size(holder.bytes)}"
    return f"{text}, a graph of {holder.operations:,} operations" if holder.operations else text


def size(count: float) -> str:
    """A number of bytes for people: 812 B, 7.2 KiB, 1.2 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
