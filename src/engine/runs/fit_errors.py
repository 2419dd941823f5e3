"""Errors that libraries raise while Lightning trains, and what the user reads instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from src.engine.commands.user_command import corrected
from src.engine.memory.out_of_memory import GPU_FAULT, gpu_fault_explained, is_out_of_memory
from src.engine.runs.errors import UserError
from src.engine.runs.reading import FOREIGN, unusable


@contextmanager
def explained(trainer: L.Trainer, start: Path | None = None) -> Iterator[None]:
    """Around trainer.fit as a whole: a GPU that has failed fails again when Lightning tidies up, and only that error comes
    out.

    start: the position that the run continues from; an error before its first step is one of that file.
    """
    restored = _Restored()
    if start is not None:
        trainer.callbacks.insert(0, restored)
    try:
        yield
    except SystemExit as error:  # how Lightning ends on Ctrl-C
        raise KeyboardInterrupt from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, RuntimeError) and any(text in str(error) for text in GPU_FAULT):
            raise gpu_fault_explained(error) from error
        if "Expected more than 1 value per channel" in str(error):
            raise UserError(
                "BatchNorm cannot normalise a single image",
                where=f"step {trainer.global_step + 1}; torch says: {error}",
                why="its statistics are taken over the images that are in a device, or in a micro-batch, at a time",
                fix=[corrected("data.batch_size=64"), corrected("freeze.batchnorm=keep")],
            ) from error
        if start is None or restored.done or is_out_of_memory(error):
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
