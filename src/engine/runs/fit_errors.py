"""Errors that libraries raise while Lightning trains, and what the user reads instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import lightning as L

from src.engine.commands.user_command import corrected
from src.engine.memory.out_of_memory import GPU_FAULT, gpu_fault_explained
from src.engine.runs.errors import UserError


@dataclass(frozen=True)
class Translation:
    error: type[BaseException]
    texts: tuple[str, ...]  # the message holds one of them
    explain: Callable[[BaseException, L.Trainer], BaseException]


def _single_image(error: BaseException, trainer: L.Trainer) -> UserError:
    return UserError(
        "BatchNorm cannot normalise a single image",
        where=f"step {trainer.global_step + 1}; torch says: {error}",
        why="its statistics are taken over the images that are in a device, or in a micro-batch, at a time",
        fix=[corrected("data.batch_size=64"), corrected("freeze.batchnorm=keep")],
    )


TRANSLATIONS = (
    Translation(ValueError, ("Expected more than 1 value per channel",), _single_image),
    Translation(RuntimeError, GPU_FAULT, lambda error, trainer: gpu_fault_explained(error)),
    Translation(SystemExit, ("",), lambda error, trainer: KeyboardInterrupt()),  # how Lightning ends on Ctrl-C
)


@contextmanager
def explained(trainer: L.Trainer) -> Iterator[None]:
    """Around trainer.fit as a whole: a GPU that has failed fails again when Lightning tidies up, and only that error comes
    out."""
    try:
        yield
    except BaseException as error:
        for row in TRANSLATIONS:
            if isinstance(error, row.error) and any(text in str(error) for text in row.texts):
                raise row.explain(error, trainer) from error
        raise
