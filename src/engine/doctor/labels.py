"""Labels in doubt, as a rehearsal finds them: by the baseline, if computing the features takes no longer than a moment.

The features stay in runs_dir/.features, where the training finds them.
"""

from __future__ import annotations

import time

from src.engine.baseline.baseline import SPLITS, fit_baseline
from src.engine.feature_bank.bank import FeatureBank
from src.engine.runs.job import Job
from src.engine.runs.task import RunTask

SECONDS = 30.0  # that a pass over the images may take


def look_for_doubts(job: Job, task: RunTask, bank: FeatureBank | None) -> dict[str, float | None]:
    """Writes doubts.csv. Returns the baseline's val accuracy, if it has one, or how long the pass would have taken. All
    processes of a run call it together."""
    if bank is None:
        return {}
    seconds = _seconds_of_pass(task, bank, job.config.data.batch_size)
    if (seconds := job.ranks.told_by_first(lambda: seconds)) > SECONDS:
        return {"seconds": seconds}
    baseline = fit_baseline(job, task, bank)
    return {} if baseline is None else {"accuracy": baseline.metrics.get("val/acc")}


def _seconds_of_pass(task: RunTask, bank: FeatureBank, size: int) -> float:
    """For the features that are missing, by the pace of the second batch: during the first, loader processes start."""
    has = bank.table(()).has
    missing = [[index for index in task.images.splits[split] if not has[index]] for split in SPLITS]
    started = next(filter(None, missing), [])
    seconds, computed = 0.0, 0
    for members in (started[:size], started[size : 2 * size]):
        if members:
            start = time.perf_counter()
            bank.table(members)
            seconds, computed = time.perf_counter() - start, len(members)
    return (sum(map(len, missing)) - min(2 * size, len(started))) * seconds / max(1, computed)
