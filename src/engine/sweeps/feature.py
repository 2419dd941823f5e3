"""hydra/launcher=ray_tune and hydra/sweeper=ray_tune: many runs at once, stopped early, continued, ranked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.engine import features
from src.engine.sweeps import settings
from src.engine.sweeps.trial import current

if TYPE_CHECKING:
    import lightning as L

    from src.engine.runs.job import Job
    from src.engine.runs.task import RunTask


def callbacks(job: Job, task: RunTask) -> list[L.Callback]:
    """Those of a trial."""
    from src.engine.sweeps.trial_report import OwnSettings, TrialReport

    trial = current()
    if trial is None:
        return []
    return [*([OwnSettings()] if trial.keeps_checkpoints else []), TrialReport(trial)]


features.add(
    features.Feature(
        name="sweeps",
        about="hydra/launcher=ray_tune, hydra/sweeper=ray_tune: sweeps on all devices, with searches, schedulers and a ranking",
        files=(
            "conf/hydra/launcher/",
            "conf/hydra/sweeper/",
            "conf/hydra/ray_tune.yaml",
            "conf/experiment/tune_*.yaml",
            "docs/sweeps.md",
            "docs/images/sweep_asha.png",
            "docs/images/sweep_parts.png",
            "scripts/benchmarks/asha.py",
            "scripts/benchmarks/head_sweep.py",
            "scripts/benchmarks/sweeps.py",
            "scripts/benchmarks/sweep_app/",
            "scripts/faults/sweeps.py",
            "scripts/launch_ray_cluster.sh",
            "tests/distributed/test_ray_cluster*.py",
            "tests/faults/test_sweep_faults.py",
        ),
        help={
            "examples": "python -m src.train -m hydra/launcher=ray_tune seed=0,1    the same on all devices, with a ranking\n"
            "python -m src.train experiment=tune_head                   a search (hydra/sweeper=ray_tune)"
        },
        words={"hydra/launcher": ("ray_tune",), "hydra/sweeper": ("ray_tune",)},
        register=settings.register,
        supervisor=current,
        callbacks=callbacks,
    )
)
