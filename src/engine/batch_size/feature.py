"""data.batch_size=auto: the largest batch that fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from src.engine import features
from src.engine.commands.rule_kinds import clash
from src.engine.commands.schema import Config, Data, Rule

if TYPE_CHECKING:
    from src.engine.runs.job import Job
    from src.engine.runs.task import RunTask


def rules() -> list[Rule]:
    def in_stages(config: Config) -> bool:
        return config.data.batch_size == "auto" and not features.shares_batches(config.strategy.name)

    why = "it measures a network that is on one device"
    return [clash("data.batch_size", "strategy", in_stages, why, "data.batch_size=32")]


def prepare(job: Job, task: RunTask) -> Job:
    from src.engine.batch_size.batch_size import settle_batch_size

    return settle_batch_size(job, task)


def data_of_run(run: Path, data: Data) -> Data:
    """The batch size that the run found; of one that ended before, 32, which changes no number."""
    from src.engine.batch_size.batch_size_search import chosen_batch_size

    return replace(data, batch_size=chosen_batch_size(run) or 32) if data.batch_size == "auto" else data


features.add(
    features.Feature(
        name="batch_size",
        about="data.batch_size=auto finds the largest batch that fits",
        files=("tests/gpu/test_batch_size_on_gpu.py",),
        help={"batch size": "  data.batch_size=auto       the largest that fits"},
        words={"data.batch_size": ("auto",)},
        rules=rules,
        prepare=prepare,
        data_of_run=data_of_run,
    )
)
