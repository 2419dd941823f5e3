"""memory.detect_growth: a warning where every step keeps some memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.engine import features

if TYPE_CHECKING:
    import lightning as L

    from src.engine.runs.job import Job
    from src.engine.runs.task import RunTask


def callbacks(job: Job, task: RunTask) -> list[L.Callback]:
    from src.engine.memory_growth.memory_growth import MemoryGrowth

    return [MemoryGrowth()] if job.config.memory.detect_growth else []


features.add(
    features.Feature(
        name="memory_growth",
        about="memory.detect_growth: a warning where every step keeps some memory, with the attribute that holds it",
        files=("tests/gpu/test_memory_growth_on_gpu.py",),
        reads=("memory.detect_growth",),
        callbacks=callbacks,
    )
)
