"""A Hydra job as a trial of Ray Tune: the job runs in a thread, and waits there after every epoch for Tune's answer.

Not Tune's function API, which ends a stopped trial in the middle of whatever it does: here the job finishes, with its best
weights measured and packaged. See docs/sweeps.md, 'How it works'.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import cloudpickle
import ray
from ray import tune
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from src.engine.features import Place
from src.engine.processes.launching import free_port
from src.engine.runs.cores import TRIAL_CPUS
from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps.folder import trained_rows
from src.engine.sweeps.jobs import CONFIG, FINISH_AFTER
from src.engine.sweeps.sweep_journal import DIVERGED, FAILED, FINISHED, PAUSED
from src.engine.sweeps.trial import FINISH, GO_ON, INTERRUPT, Trial, working_on
from src.engine.sweeps.worker import Context, Job, JobRunner, describe, has_diverged, keep_checkpoints, take_over

log = logging.getLogger(__name__)

# Keys in the results of a trial, beside the metrics.
ROW = "row"  # as it was reported; beside it the metric is finite for Tune, which compares and averages it
STATE = "trial state"  # in the journal, at the trial's own end; not there where the scheduler ends it
VALUE = "trial value"  # the job's return value; nan where it is no number
ERROR = "trial error"  # the first line of its error
REPORTED = "reported"  # where the metric is missing: the names that the job reports
HISTORY = "history"  # in the first result of a start under pbt: the rows of the epochs that led to the weights

LOOK_SECONDS = 0.5  # how often a worker looks whether the sweep was interrupted


class HydraTrainable(tune.Trainable):
    """One trial at a time; the process is used for many (reuse_actors)."""

    def setup(self, config: dict[str, Any], context: Context) -> None:
        _keep_to_the_share()
        self.context = context
        self.runner = JobRunner(context)
        self.job: Job | None = None
        self.previous_job: Job | None = None  # of the trial that had this process before, and may still be finishing
        self.peers: list[Any] = []
        self.last: dict[str, Any] = {}  # the last row, as Tune was told it
        self._saved = False  # since the last row: Tune is about to pause the trial

    def step(self) -> dict[str, Any]:
        if self.job is None:
            self._end_previous()
            self._begin()
        else:
            self.job.trial.answer(INTERRUPT if self.context.interruption_mark.exists() else GO_ON)
        self._saved = False
        trial = self.job.trial
        # If a scheduler stopped the trial in an earlier start, Tune gets its end alone: the journal has the rows.
        while (row := trial.next_row(LOOK_SECONDS)) is None or (row and trial.finish_after is not None):
            if not trial.interrupted and self.context.interruption_mark.exists():
                trial.answer(INTERRUPT)
        return self._reported(row) if row else self._ended()

    def _begin(self) -> None:
        place = self._meet_peers()
        self.last = {}
        trial = Trial(self.context.keeps_checkpoints, place, self.config.get(FINISH_AFTER))
        if trial.finish_after is not None:
            trial.answer(FINISH)
        self.job = Job(self.runner, int(self.trial_id), cloudpickle.loads(self.config[CONFIG]), trial)

    def _meet_peers(self) -> Place:
        """A trial on several machines (trainer.num_nodes): its processes on the others are started by a peer there."""
        group: PlacementGroup | None = ray.util.get_current_placement_group()
        nodes = group.bundle_count if group else 1
        if nodes == 1:
            return Place()
        address, port = ray.util.get_node_ip_address(), free_port()
        for node in range(1, nodes):
            bundle = dict(group.bundle_specs[node])
            options = {"num_cpus": bundle.pop("CPU", 0), "num_gpus": bundle.pop("GPU", 0), "resources": bundle}
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
            peer = ray.remote(Peer).options(scheduling_strategy=where, **options).remote(self.context)
            peer.run.remote(self.config[CONFIG], Place(node, nodes, address, port))
            self.peers.append(peer)
        return Place(0, nodes, address, port)

    @property
    def _folder(self) -> Path:
        return self.context.folder(int(self.trial_id))

    @property
    def _overrides(self) -> list[str]:
        """The command line of the job, without settings of hydra itself."""
        return list(cloudpickle.loads(self.config[CONFIG]).hydra.overrides.task)

    def _reported(self, row: dict[str, float]) -> dict[str, Any]:
        goal = self.context.goal
        if goal.metric not in row:
            self.job.trial.answer(INTERRUPT)
            error = {STATE: FAILED, ERROR: f"it does not report {goal.metric}"}
            return {goal.metric: goal.worst, **row, **error, "done": True, REPORTED: sorted(row.keys() - {"epoch"})}
        told = {ROW: row} | self._history(row["epoch"])
        self.last = row | {goal.metric: goal.finite(row[goal.metric])}
        return self.last | told

    def _history(self, epoch: float = math.inf) -> dict[str, Any]:
        """Before the first report of a start, if the weights may be another trial's: the epochs that led to them."""
        if not self.context.changes_points or self.last:
            return {}
        return {HISTORY: [row for row in trained_rows(self._folder) if row["epoch"] < epoch]}

    def _ended(self) -> dict[str, Any]:
        job, goal = self.job, self.context.goal
        self._leave_peers()
        # Schedulers need metric and epoch. MedianStoppingRule leaves out a trial that ends with a smaller epoch than it
        # reported, as a trial would whose epochs were all trained in an earlier start.
        rows = trained_rows(self._folder) if job.error is None else []
        last = {goal.metric: goal.worst, "epoch": max((row["epoch"] for row in rows), default=0)}
        last |= self.last | self._history() | {"done": True}
        if job.interrupted:  # its position is saved, and it goes on when the sweep does
            return last | {STATE: PAUSED}
        if has_diverged(job.error):
            return last | {goal.metric: goal.worst, STATE: DIVERGED, ERROR: describe(job.error)}
        if job.error is not None:
            if _poisons(job.error):
                raise job.error
            return last | {STATE: FAILED, ERROR: describe(job.error)}
        number = float(job.value) if isinstance(job.value, int | float) else math.nan
        return last | {goal.metric: goal.finite(number)} | self.last | {STATE: FINISHED, VALUE: number}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune asks for it between two steps, while the job waits."""
        self._saved = True
        keep_checkpoints(self._folder, Path(checkpoint_dir), int(self.trial_id), self._overrides)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Before the first step, since the folder is Tune's, and may be gone by then."""
        if self.previous_job is not None and self.previous_job.number == int(
            self.trial_id
        ):  # it works in the same folder
            self._end_previous()
        take_over(self._folder, Path(checkpoint_dir), int(self.trial_id), self._overrides)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial gets the process. The previous job is ended in the first step: if it hung and the process ended here,
        Tune would count a failure of the next trial, and not try that one again."""
        self.previous_job, self.job = self.job, None
        return True

    def cleanup(self) -> None:
        self._end_previous()
        self._end(self.job)

    def _end_previous(self) -> None:
        self._end(self.previous_job)
        self.previous_job = None

    def _end(self, job: Job | None) -> None:
        """Has a job finish, or save its position where it goes on later, and waits for it."""
        if job is None:
            return
        paused = self._saved or self.context.keeps_checkpoints or self.context.interruption_mark.exists()
        job.trial.answer(INTERRUPT if paused else FINISH)
        job.thread.join(self.context.grace_s)
        self._leave_peers()
        if job.thread.is_alive():
            log.error(f"trial {job.number} did not end within {self.context.grace_s:g} seconds")
            os._exit(1)  # a trial beside it would be disturbed; Tune starts the next one in a new process

    def _leave_peers(self) -> None:
        for peer in self.peers:
            ray.kill(peer)
        self.peers = []


class Peer:
    """Starts the processes that a trial has on a further machine."""

    def __init__(self, context: Context) -> None:
        os.environ["TUNE_ORIG_WORKING_DIR"] = str(Path.cwd())
        _keep_to_the_share()
        self.runner = JobRunner(context)

    def run(self, config: bytes, place: Place) -> None:
        with working_on(Trial(place=place)):
            self.runner.run(cloudpickle.loads(config))


def _keep_to_the_share() -> None:
    """Has the jobs of this process use the cores and GPUs that Ray gave to it."""
    share = ray.get_runtime_context().get_assigned_resources()
    if share.get("CPU"):
        os.environ[TRIAL_CPUS] = str(share["CPU"])
        # Ray's own choice for the whole trial, which every process of strategy=ddp would take for its own.
        os.environ.pop("OMP_NUM_THREADS", None)
    if not share.get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all in sight, and trainer.accelerator=auto takes one


def _poisons(error: BaseException) -> bool:
    """Whether no other trial may use the process after this error; such a trial goes on in a new one (max_failures)."""
    broken = (ExitCode.PROCESS_LOST, ExitCode.GPU_FAULT, ExitCode.OUT_OF_MEMORY)
    known = isinstance(error, UserError) and error.code in broken
    return known or "CUDA" in str(error) or "out of memory" in str(error)
