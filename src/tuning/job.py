"""One job of a sweep in a worker process: composed as Hydra composes it, and run as if the process had just started.

The driver makes a `Context`, which every worker gets once; a worker makes a `JobRunner` of it, which runs its jobs one
after another (src/tuning/trainable.py).
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathElement
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

import src
from src.errors import ExitCode, UserError
from src.files import read_metrics, write_json
from src.reporting.goal import Goal
from src.reporting.sweep_journal import OVER, TrialRecord
from src.tuning import settings
from src.user_command import shell_command

if TYPE_CHECKING:
    from src.tuning.source import Plan

log = logging.getLogger(__name__)

PROJECT = Path(src.__file__).resolve().parent.parent  # the folder of src/ and conf/
JOB = "job"  # in the config of a trial, beside its point: its number
FINISH_AFTER = (
    "finish_after"  # the epoch after which the trial was ended in an earlier start, and had not come to its end
)
STATE = ".tune"  # in the folder of a sweep: what only the sweep itself reads


@dataclass(frozen=True)
class HydraJob:
    """What Hydra hands to a plugin."""

    context: HydraContext
    task: TaskFunction
    config: DictConfig


@dataclass(frozen=True)
class Context:
    """What the workers of a sweep need, all of them the same."""

    task: tuple[str, str]  # module and name of the function that runs a job
    plan: Plan
    goal: Goal
    sweep_dir: Path  # absolute, on a disk that all machines share
    scratch: Path  # in it: Tune's own files of this start
    keeps_checkpoints: bool  # the scheduler copies checkpoints between trials, and stops a trial to go on with another
    changes_points: bool  # it also changes the settings of a trial under way
    grace_s: float
    cwd: Path | None  # where the jobs run; None: where the code was sent to
    project: Path
    command: str  # the sweep's, for messages
    search_path: list[tuple[str, str]]
    state: bytes  # the sweep's own config and Hydra's singletons, which hold the config nodes and resolvers


def make_context(hydra: HydraJob, *, ship_code: bool, **of_the_sweep: Any) -> Context:
    """On the driver. of_the_sweep: the fields of a Context that depend on it."""
    return Context(
        task=_name_of(hydra.task),
        cwd=None if ship_code else Path.cwd(),
        project=PROJECT,
        command=shell_command(),
        search_path=[(part.provider, part.path) for part in hydra.context.config_loader.get_search_path().get_path()],
        state=cloudpickle.dumps((hydra.config, Singleton.get_state())),
        **of_the_sweep,
    )


def _name_of(task: TaskFunction) -> tuple[str, str]:
    """Sent by name: what a program's own module holds (locks, open files) cannot be sent by value."""
    module = task.__module__
    if module == "__main__":
        spec = sys.modules["__main__"].__spec__
        assert spec is not None, "start the program with python -m, so that workers can import it"
        module = spec.name
    return module, task.__qualname__


def compose(loader: ConfigLoader, sweep: DictConfig, overrides: Sequence[str], number: int, folder: Path) -> DictConfig:
    """The whole config of a job, hydra: included, as Hydra's own launcher makes it. folder: of the sweep.

    The folder is said, since that of a sweep without a name is made of the time. Raises HydraException.
    """
    config = loader.load_sweep_config(sweep, list(overrides))
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.job.num = number
        config.hydra.job.id = f"{config.hydra.job.name}_{number}"
        config.hydra.sweep.dir = str(folder)
    return config


@contextmanager
def as_current(config: DictConfig) -> Iterator[None]:
    """Inside, ${hydra:...} is that of the job."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def folder_of(config: DictConfig) -> Path:
    """Where the job writes."""
    with as_current(config):
        return Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)


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
        settings.register()  # before Hydra looks for plugins, which set_state does
        module, name = context.task
        task = getattr(importlib.import_module(module), name)
        self.task: Callable[[DictConfig], Any] = getattr(task, "__wrapped__", task)
        setup_globals()
        self.sweep, singletons = cloudpickle.loads(context.state)
        Singleton.set_state(singletons)
        search_path = ConfigSearchPathImpl()
        search_path.config_search_path = [
            SearchPathElement(provider, path.replace(str(context.project), str(PROJECT)))
            for provider, path in context.search_path
        ]
        self.loader = ConfigLoaderImpl(search_path)
        self.folder: Path | None = None  # of the job at hand
        self.set_aside = False

    def run(
        self, number: int, overrides: Sequence[str], start_from: Path | None = None, first: bool = True
    ) -> JobReturn:
        """Runs a job to its end; an Exception is in the JobReturn. start_from: what `keep_checkpoints` made.

        first: False on the further machines of a job that has several, which write nothing.
        """
        config = compose(self.loader, self.sweep, overrides, number, self.context.sweep_dir)
        self.folder = folder_of(config)
        if start_from is not None:
            take_over(self.folder, start_from, number, overrides)
        elif self.context.changes_points:  # killed between two lives, it has the settings of the one before
            (self.folder / "config.yaml").unlink(missing_ok=True)
        with _as_it_was(), as_current(config):
            done = run_job(
                task_function=self.task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=HydraContext(self.loader, Callbacks(self.sweep)),
            )
        if done.status == JobStatus.COMPLETED and "torch" in sys.modules and not self.set_aside:
            # Set aside what is there to stay (torch, Lightning, Ray): each collection would look through it again, for
            # 0.3 s. Not after an error, whose frames would be among it, and with them the network.
            gc.freeze()
            self.set_aside = True  # gc.get_freeze_count() takes 50 ms
        if first and done.status == JobStatus.COMPLETED:
            write_json(returned_file(self.context.sweep_dir, number), {"value": _plain(done.return_value)})
        elif first:
            error = done._return_value  # return_value would raise it
            lines = traceback.format_exception(error)
            (self.folder / "error.log").write_text("".join(lines), encoding="utf-8")
            if has_diverged(error):  # it would do so again
                write_json(returned_file(self.context.sweep_dir, number), {"value": self.context.goal.worst})
        return done


def has_diverged(error: BaseException) -> bool:
    """Whether a job ended with a loss of nan or inf: of a search's point that says something, and it is no failure."""
    return isinstance(error, UserError) and error.code == ExitCode.DIVERGED


def returned_file(sweep_dir: Path, number: int) -> Path:
    """What a job returned: {"value": ...}. The file is the proof that the job came to its end."""
    return sweep_dir / STATE / "returned" / f"{number}.json"


def returned(sweep_dir: Path, number: int) -> dict[str, Any] | None:
    """What that file says; None where there is none, or one that is damaged: then the job is to be done again."""
    file = returned_file(sweep_dir, number)
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and "value" in content else None


def is_done(sweep_dir: Path, trial: TrialRecord, keeps_checkpoints: bool) -> bool:
    """Whether nothing of a trial is left to do: it is over, and measured, where it is not one that may go on."""
    measured = trial.value is not None or keeps_checkpoints or returned(sweep_dir, trial.number) is not None
    return trial.state in OVER and measured


def trained_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a job's metrics.csv; none where it has none, or a damaged one."""
    file = folder / "metrics.csv"
    try:
        rows = read_metrics(file) if file.is_file() else []
    except (OSError, ValueError, TypeError):
        return []
    return [row for row in rows if 1 <= row.get("epoch", 0) < 10**9]


def _plain(value: Any) -> Any:
    """A return value as JSON has it; None for what it has not."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return None


def keep_checkpoints(folder: Path, target: Path, number: int, overrides: Sequence[str]) -> None:
    """Copies the checkpoints of a job's folder to `target`, for another trial or a later start of this one."""
    write_json(target / "trial.json", {"number": number, "overrides": list(overrides)})
    if (folder / "checkpoints").is_dir():
        shutil.copytree(folder / "checkpoints", target / "checkpoints", ignore=shutil.ignore_patterns("*.tmp"))
    if (folder / "metrics.csv").exists():
        shutil.copyfile(folder / "metrics.csv", target / "metrics.csv")


def take_over(folder: Path, source: Path, number: int, overrides: Sequence[str]) -> None:
    """Makes a job's folder go on from the checkpoints in `source`, with the settings that it has now.

    Where they are its own of these settings nothing is done: what is in the folder is as new, or newer.
    """
    made = json.loads((source / "trial.json").read_text(encoding="utf-8"))
    if made == {"number": number, "overrides": list(overrides)}:
        return
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if (source / "checkpoints").is_dir():
        shutil.copytree(source / "checkpoints", folder / "checkpoints")
    for name in ("config.yaml", "result.json", "metrics.csv"):
        (folder / name).unlink(missing_ok=True)
    if (source / "metrics.csv").exists():
        shutil.copyfile(source / "metrics.csv", folder / "metrics.csv")


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Afterwards the process is as before: environment, folder, arguments, threads of torch, and memory is given back."""
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
    """Gives back what nothing refers to any more, on the GPU too. A trainer and its model refer to each other."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    from src.ram import give_back_freed_memory

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    give_back_freed_memory()


def describe(error: BaseException) -> str:
    """The first line of what went wrong."""
    lines = str(error).strip().splitlines()
    name = "" if type(error).__name__ in ("UserError", "ErrorOfProcess") else f"{type(error).__name__}: "
    # A process of strategy=ddp has printed its error as people see it: ERROR, what was found, the exit code.
    return name + (lines[0].removeprefix("ERROR").strip() if lines else "(no message)")
