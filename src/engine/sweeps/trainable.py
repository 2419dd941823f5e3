"""A Hydra job as a trial of Ray Tune: the job runs in a thread, and waits there after every epoch for Tune's answer.

Not Tune's function API, which ends a stopped trial in the middle of whatever it does: here the job finishes, with its best
weights measured and packaged. See docs/sweeps.md, 'How it works'.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import cloudpickle
import ray
from omegaconf import DictConfig
from ray import tune
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from src.engine.features import Place
from src.engine.processes.launching import free_port
from src.engine.runs.cores import TRIAL_CPUS
from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps.folder import trained_rows
from src.engine.sweeps.jobs import CONFIG, FINISH_AFTER
from src.engine.sweeps.trial import FINISH, GO_ON, INTERRUPT, Trial, working_on
from src.engine.sweeps.worker import (
    Context,
    JobRunner,
    describe,
    free_memory,
    has_diverged,
    keep_checkpoints,
    overrides_of,
)

log = logging.getLogger(__name__)

# Keys in the results of a trial, beside the metrics.
ROW = (
    "row"  # an epoch's row as it was reported; beside it the metric is finite for Tune, which compares and averages it
)
RETURNED = "returned"  # the job's return value at its own end; nan where it is no number
FAILED = "failed"  # the first line of its error
DIVERGED = "diverged"  # the first line of its error, which was a loss of nan or inf
REPORTED = "reported"  # where the metric is missing: the names that the job reports
INTERRUPTED = "interrupted"  # True: its position is saved, and it goes on when the sweep does
HISTORY = "history"  # in the first result of a start under pbt: the rows of the epochs that led to the weights

LOOK_SECONDS = 0.5  # how often a worker looks whether the sweep was interrupted
# Errors after which no other trial may use the process; such a trial goes on in a new one (max_failures).
POISONS = (ExitCode.PROCESS_LOST, ExitCode.GPU_FAULT, ExitCode.OUT_OF_MEMORY)


def interruption_mark(context: Context) -> Path:
    """A file that is there while the sweep is being interrupted: its trials save their position and end."""
    return context.scratch / "interrupted"


class Job:
    """A job in a thread."""

    def __init__(
        self, runner: JobRunner, number: int, config: DictConfig, start_from: Path | None, trial: Trial
    ) -> None:
        self.runner, self.number, self.config, self.trial = runner, number, config, trial
        self.value: Any = None
        self.error: Exception | SystemExit | None = None
        self.interrupted = False
        self.thread = threading.Thread(target=self._run, args=(start_from,), daemon=True, name=f"job {number}")
        self.thread.start()

    def _run(self, start_from: Path | None) -> None:
        try:
            with working_on(self.trial):
                self.value = self.runner.run(self.number, self.config, start_from)
        except (Exception, SystemExit) as error:
            self.error = error
        except BaseException:  # Terminated, KeyboardInterrupt: the position is saved
            self.interrupted = True
        finally:
            if self.error is not None:
                # Its frames, and those of its cause, hold the network, for which the next trial may need the memory.
                self.error.__traceback__ = self.error.__cause__ = self.error.__context__ = None
            if self.error is not None or self.interrupted:
                free_memory()
            if start_from is not None:
                shutil.rmtree(start_from, ignore_errors=True)
            self.trial.over()


class HydraTrainable(tune.Trainable):
    """One trial at a time; the process is used for many (reuse_actors)."""

    def setup(self, config: dict[str, Any], context: Context) -> None:
        _keep_to_the_share()
        self.context = context
        self.runner = JobRunner(context)
        self.job: Job | None = None
        self.previous_job: Job | None = None  # of the trial that had this process before, and may still be finishing
        self.start_from: Path | None = None
        self.peers: list[Any] = []
        self.last: dict[str, Any] = {}  # the last row, as Tune was told it
        self._saved = False  # since the last row: Tune is about to pause the trial

    def step(self) -> dict[str, Any]:
        if self.job is None:
            self._end(self.previous_job)
            self.previous_job = None
            self._begin()
        else:
            self.job.trial.answer(INTERRUPT if interruption_mark(self.context).exists() else GO_ON)
        self._saved = False
        trial = self.job.trial
        # If a scheduler stopped the trial in an earlier start, Tune gets its end alone: the journal has the rows.
        while (row := trial.next_row(LOOK_SECONDS)) is None or (row and trial.finish_after is not None):
            if not trial.interrupted and interruption_mark(self.context).exists():
                trial.answer(INTERRUPT)
        return self._reported(row) if row else self._ended()

    def _begin(self) -> None:
        place = self._meet_peers()
        self.last = {}
        trial = Trial(self.context.keeps_checkpoints, place, self.config.get(FINISH_AFTER))
        if trial.finish_after is not None:
            trial.answer(FINISH)
        config = cloudpickle.loads(self.config[CONFIG])
        self.job = Job(self.runner, int(self.trial_id), config, self.start_from, trial)
        self.start_from = None

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
        return self.runner.folder(int(self.trial_id))

    def _reported(self, row: dict[str, float]) -> dict[str, Any]:
        goal = self.context.goal
        if goal.metric not in row:
            self.job.trial.answer(INTERRUPT)
            missing = f"it does not report {goal.metric}"
            names = sorted(name for name in row if name != "epoch")
            return {goal.metric: goal.worst, **row, "done": True, FAILED: missing, REPORTED: names}
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
        last |= self.last | self._history()
        if job.interrupted:
            return last | {"done": True, INTERRUPTED: True}
        if has_diverged(job.error):
            return last | {goal.metric: goal.worst, "done": True, DIVERGED: describe(job.error)}
        if job.error is not None:
            if _poisons(job.error):
                raise job.error
            return last | {"done": True, FAILED: describe(job.error)}
        number = float(job.value) if isinstance(job.value, int | float) else math.nan
        return last | {goal.metric: goal.finite(number)} | self.last | {"done": True, RETURNED: number}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune asks for it between two steps, while the job waits."""
        self._saved = True
        overrides = overrides_of(cloudpickle.loads(self.config[CONFIG]))
        keep_checkpoints(self._folder, Path(checkpoint_dir), int(self.trial_id), overrides)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Before the first step. The folder is Tune's, and may be gone by then."""
        self.start_from = Path(tempfile.mkdtemp(prefix="trial-"))
        shutil.copytree(checkpoint_dir, self.start_from, dirs_exist_ok=True)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial gets the process. The previous job is ended in the first step: if it hung and the process ended here,
        Tune would count a failure of the next trial, and not try that one again."""
        self.previous_job, self.job, self.start_from = self.job, None, None
        return True

    def cleanup(self) -> None:
        self._end(self.previous_job)
        self._end(self.job)

    def _end(self, job: Job | None) -> None:
        """Has a job finish, or save its position where it goes on later, and waits for it."""
        if job is None:
            return
        paused = self._saved or self.context.keeps_checkpoints or interruption_mark(self.context).exists()
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
            self.runner.run_task(cloudpickle.loads(config))


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
    code = error.code if isinstance(error, UserError) else None
    return code in POISONS or "CUDA" in str(error) or "out of memory" in str(error)
