"""A run that continues from a position: what Lightning restores must fit the run, or a UserError names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from src.engine.memory.out_of_memory import is_out_of_memory
from src.engine.runs.reading import FOREIGN, unusable


@contextmanager
def taking_up(trainer: L.Trainer, start: Path | None) -> Iterator[None]:
    """Inside, trainer.fit continues from `start`; an error before the first step is a UserError about that file."""
    if start is None:
        yield
        return
    restored = _Restored()
    trainer.callbacks.insert(0, restored)
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if restored.done or is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise unusable(f"{start} cannot be taken up", start.parent, [start], [f"it {FOREIGN}: {reason}"]) from error


class _Restored(L.Callback):
    """`done` as soon as Lightning has restored everything.

    torch accepts any shape for an optimizer's averages, and a schedule's state that replaces its methods: both would show
    only in a later step. Raises ValueError.
    """

    def __init__(self) -> None:
        self.done = False
        self._built: list[dict[str, Any]] = []  # the schedules' values before they are restored

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._built = [dict(vars(config.scheduler)) for config in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                tensors = [value for value in state.values() if isinstance(value, Tensor)]
                if any(tensor.shape not in ((), parameter.shape) for tensor in tensors):
                    raise ValueError("the optimizer's state is that of another network")
        for config, built in zip(trainer.lr_scheduler_configs, self._built, strict=True):
            for name, value in vars(config.scheduler).items():
                replaces_method = callable(getattr(type(config.scheduler), name, None))
                if replaces_method or (name in built and _kind(value) is not _kind(built[name])):
                    raise ValueError(f"{name} of the learning rate's schedule cannot be this")
        self.done = True


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)
