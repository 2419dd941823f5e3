"""The jobs of a worker process, one after another, each as if the process had just started.

The driver makes a `Context`, which every worker gets once, and sends the config of each job (src/engine/sweeps/jobs.py).
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import logging
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import version
from hydra.core.utils import JobRuntime, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from src.engine.memory.ram import give_back_freed_memory
from src.engine.runs import logs
from src.engine.runs.errors import ErrorOfProcess, ExitCode, UserError
from src.engine.runs.files import write_json
from src.engine.sweeps.folder import returned_file
from src.engine.sweeps.sweep_journal import Goal
from src.engine.sweeps.trial import Trial, working_on

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """What all workers of a sweep need."""

    task: tuple[str, str]  # module and name of the function that runs a job
    hydra: HydraContext
    version_base: str  # of the program's hydra.main
    goal: Goal
    sweep_dir: Path  # absolute, on a disk that all machines share
    scratch: Path  # in it: Tune's own files of this start
    keeps_checkpoints: bool  # the scheduler copies checkpoints between trials, or pauses trials
    changes_points: bool  # it also changes the settings of a trial under way
    grace_s: float
    cwd: Path | None  # where the jobs run; None: where the code was sent to
    command: str  # the sweep's, for messages

    @property
    def interruption_mark(self) -> Path:
        """A file that is there while the sweep is being interrupted: its trials save their position and end."""
        return self.scratch / "interrupted"

    def folder(self, number: int) -> Path:
        return self.sweep_dir / str(number)


def name_of(task: TaskFunction) -> tuple[str, str]:
    """Module and name of the task. It is sent by name: its module may hold locks and open files, which have no value."""
    module = task.__module__
    if module == "__main__":
        spec = sys.modules["__main__"].__spec__
        assert spec is not None, "start the program with python -m, so that workers can import it"
        module = spec.name
    return module, task.__qualname__


class JobRunner:
    """Runs the jobs of one worker."""

    def __init__(self, context: Context) -> None:
        self.context = context
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # else Tune changes it for every trial, under a job that still runs
        os.chdir(context.cwd or os.environ["TUNE_ORIG_WORKING_DIR"])
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        os.environ["TRAIN_COMMAND"] = context.command
        logging.getLogger().setLevel(logging.INFO)  # of the jobs' own log files
        logs.ignore_warnings(logs.MIGRATION)
        version.setbase(self.context.version_base)  # else Hydra would change the working folder for each job
        setup_globals()
        module, name = context.task
        task = getattr(importlib.import_module(module), name)
        self.task: Callable[[DictConfig], Any] = getattr(task, "__wrapped__", task)
        self.froze = False

    def run(self, config: DictConfig) -> Any:
        """The value of a job; raises its Exception. Writes nothing of its own: a job's further machines call it too."""
        errors: list[Exception] = []

        @functools.wraps(self.task)
        def task(config: DictConfig) -> Any:
            try:
                return self.task(config)
            except Exception as error:  # Hydra's JobReturn would print it when asked
                errors.append(error)
                raise

        JobRuntime.instance().set("name", config.hydra.job.name)
        with _restored_process():
            done = run_job(task, config, "hydra.sweep.dir", "hydra.sweep.subdir", hydra_context=self.context.hydra)
        if errors:
            raise errors.pop()
        if "torch" in sys.modules and not self.froze:
            # Later collections skip the objects of torch, Lightning and Ray (0.3 s each). Not after a failed job, whose
            # traceback holds the network.
            gc.freeze()
            self.froze = True  # gc.get_freeze_count() takes 50 ms
        return done.return_value


class Job:
    """A job in a thread. When the trial says that it is over, it has a value or an error, or was interrupted."""

    def __init__(self, runner: JobRunner, number: int, config: DictConfig, trial: Trial) -> None:
        self.number, self.trial = number, trial
        self.value: Any = None
        self.error: Exception | SystemExit | None = None
        self.interrupted = False
        self.thread = threading.Thread(target=self._run, args=(runner, config), daemon=True)
        self.thread.start()

    def _run(self, runner: JobRunner, config: DictConfig) -> None:
        context, folder = runner.context, runner.context.folder(self.number)
        try:
            if context.changes_points:  # killed between two lives, it has the settings of the one before
                (folder / "config.yaml").unlink(missing_ok=True)
            with working_on(self.trial):
                self.value = runner.run(config)
            if (folder / "result.json").exists():  # a finished run never goes on, and a sweep keeps many
                from src.engine.runs.writing import LAST, PREVIOUS  # imports torch, for which such a run has waited

                for name in (LAST, PREVIOUS):
                    (folder / "checkpoints" / name).unlink(missing_ok=True)
            write_json(returned_file(context.sweep_dir, self.number), {"value": as_json(self.value)})
        except (Exception, SystemExit) as error:
            self.error = error
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.log").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            if has_diverged(error):  # it would do so again
                write_json(returned_file(context.sweep_dir, self.number), {"value": context.goal.worst})
        except BaseException:  # Terminated, KeyboardInterrupt: the position is saved
            self.interrupted = True
        finally:
            if self.error is not None:
                # Its frames, and those of its cause, hold the network, for which the next trial may need the memory.
                self.error.__traceback__ = self.error.__cause__ = self.error.__context__ = None
            if self.error is not None or self.interrupted:
                free_memory()
            self.trial.over()


def has_diverged(error: BaseException) -> bool:
    """Whether a job ended with a loss of nan or inf: of a search's point that says something, and it is no failure."""
    return isinstance(error, UserError) and error.code == ExitCode.DIVERGED


def as_json(value: Any) -> Any:
    """A return value as JSON has it; None for any other."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return None


def keep_checkpoints(folder: Path, target: Path, number: int, overrides: Sequence[str]) -> None:
    """Copies the checkpoints of a job's folder to `target`, for another trial or a later start of this one."""
    write_json(target / "trial.json", {"number": number, "overrides": list(overrides)})
    _copy_checkpoints(folder, target)


def take_over(folder: Path, source: Path, number: int, overrides: Sequence[str]) -> None:
    """Makes a job's folder go on from the checkpoints in `source`, with the settings that it has now.

    Nothing is done if they are its own with these settings: the folder has the same or newer ones.
    """
    origin = json.loads((source / "trial.json").read_text(encoding="utf-8"))
    if origin == {"number": number, "overrides": list(overrides)}:
        return
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in ("config.yaml", "result.json", "metrics.csv"):
        (folder / name).unlink(missing_ok=True)
    _copy_checkpoints(source, folder)


def _copy_checkpoints(source: Path, target: Path) -> None:
    if (source / "checkpoints").is_dir():
        shutil.copytree(source / "checkpoints", target / "checkpoints", ignore=shutil.ignore_patterns("*.tmp"))
    if (source / "metrics.csv").exists():
        shutil.copyfile(source / "metrics.csv", target / "metrics.csv")


@contextmanager
def _restored_process() -> Iterator[None]:
    """Afterwards environment, working folder, arguments and torch's threads are as before, and memory is given back."""
    environment, cwd, argv = dict(os.environ), Path.cwd(), list(sys.argv)
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        sys.argv[:] = argv
        if threads is not None:
            torch.set_num_threads(threads)
        free_memory()


def free_memory() -> None:
    """Gives back memory that nothing refers to any more, on the GPU too. A trainer and its model refer to each other."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    give_back_freed_memory()


def describe(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    name = "" if isinstance(error, UserError | ErrorOfProcess) else f"{type(error).__name__}: "
    # A process of strategy=ddp has printed its error as people see it: ERROR, what was found, the exit code.
    return name + (lines[0].removeprefix("ERROR").strip() if lines else "(no message)")
