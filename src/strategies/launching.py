"""Starts the processes of a run that has several (strategy=ddp, strategy=pipeline), watches over them, and says who failed.

Every process is a `python -m src.rank`, which gets the composed config of this very job: the command line is not run a
second time, so a sweep starts the processes of each of its jobs and no others. The command itself trains nothing. So it
can always answer: to Ctrl-C and SIGTERM, which it hands on; to the death of a process, which it names; and should it die
itself, its processes notice and end. torch is not imported here.

The processes of one machine meet through a file in a private folder: nothing listens that another user could talk to,
but the connections of gloo and NCCL, on the loopback interface.

Where something else starts the processes (torchrun, or SLURM through it), they are `python -m src.train` themselves, and
only src/strategies/launch_checks.py is of use. Both ways the environment variables are torchrun's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import yaml

from src import signals
from src import trial as trials
from src.config import Config, device_count, plain
from src.errors import ErrorOfProcess, ExitCode, UserError
from src.run_dir import RunFolder
from src.run_names import claim
from src.user_command import corrected, named, shell_command

log = logging.getLogger(__name__)

PROCESS_PER_DEVICE = ("ddp", "pipeline")
CONNECTION_LOST = "the connection to another process of this run is lost"
STORE = "RANKS_STORE"  # environment: the file through which the processes of one machine meet
GRACE_SECONDS = 5.0  # that the other processes have to end by themselves after one has failed
AGAIN_SECONDS = 20.0  # that all have to end after a second signal
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # the interface by which a machine talks to itself
STOPPED = {ExitCode.TERMINATED: signal.SIGTERM, ExitCode.INTERRUPTED: signal.SIGINT}  # codes of processes told to end


def processes_to_start(config: Config) -> int:
    """How many processes this command starts for the run on this machine; 0: none, it trains by itself."""
    if launched_from_outside() or config.strategy.name not in PROCESS_PER_DEVICE:
        return 0
    count = device_count(config.trainer)
    return count if count * config.trainer.num_nodes > 1 else 0


def launched_from_outside() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_in_processes(config: Config, path: Path, count: int) -> float:
    """The run in `count` processes of this machine; returns the metric that chose the best epoch.

    In a trial of a sweep the machine may be one of several (`Place`); the others than the first return nan. Raises the
    UserError of the process that failed, Terminated or KeyboardInterrupt where they were told to end.
    """
    folder = RunFolder(path, {})
    trial = trials.current()
    place = trial.place if trial else trials.Place()
    received: list[int] = []  # signals; raised where Python happens to be, they would leave processes behind
    with ExitStack() as stack:
        stack.enter_context(signals.handled_by(lambda number, _: received.append(number)))
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ranks-")))
        environment = stack.enter_context(trials.answering_processes(trial)) if trial else {}
        processes = [_Process(local_rank, count, place, environment, private) for local_rank in range(count)]
        try:
            job = yaml.safe_dump({"config": plain(config), "path": str(path), "parent": os.getpid()})
            for process in processes:
                process.start(job)
            _wait(processes, trial, received)
        finally:
            for process in processes:
                process.kill()
        try:
            _raise_failure(processes, path, received)
        except UserError as error:
            # Else the first process has noted its end itself, or found that the folder is another command's.
            if error.code == ExitCode.PROCESS_LOST:
                folder.note_death(error)
            raise
    if place.node > 0:
        return math.nan
    metrics = json.loads((path / "result.json").read_text(encoding="utf-8"))["metrics"]
    return metrics.get(config.checkpoint.monitor, math.nan)


class _Process:
    """One of the processes, and what it printed to stderr. private: a folder that only this user may look into."""

    def __init__(
        self, local_rank: int, count: int, place: trials.Place, environment: dict[str, str], private: Path
    ) -> None:
        self.rank, self.errors = place.node * count + local_rank, private / str(local_rank)
        self.environment = {
            **os.environ,
            **environment,
            **{"RANK": str(self.rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(place.node)},
            **{"WORLD_SIZE": str(count * place.nodes), "LOCAL_WORLD_SIZE": str(count)},
            "TRAIN_COMMAND": shell_command(),
        }
        if place.nodes > 1:
            self.environment |= {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
        else:
            self.environment[STORE] = str(private / "store")
            if sys.platform in LOOPBACK:
                for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # else they listen on a network's address
                    self.environment.setdefault(name, LOOPBACK[sys.platform])
        self.hung = False  # whether it did not end by itself after another had failed
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self, job: str) -> None:
        with self.errors.open("wb") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "src.rank"],
                stdin=subprocess.PIPE,
                stdout=None if self.rank == 0 else subprocess.DEVNULL,  # the others' messages: rank1.log, ...
                stderr=errors,
                env=self.environment,
                # Ctrl-C reaches this command alone, which hands it on: it would arrive twice otherwise.
                **({"process_group": 0} if os.name == "posix" else {}),
            )
        with suppress(BrokenPipeError), self.popen.stdin as pipe:  # it may be told to end before it reads
            pipe.write(job.encode())

    @property
    def code(self) -> int | None:
        """As of subprocess: None while it runs, -N where signal N killed it; but a process that was told to end before it
        could answer has the code of those that could."""
        code = self.popen.poll() if self.popen else None
        if code is not None and 128 < code < 160 and code not in STOPPED:
            return 128 - code  # as a shell says it, which may stand in between
        return signals.code_of(-code) if code is not None and -code in signals.NUMBERS else code

    def send(self, number: int) -> None:
        """A console of Windows sends Ctrl-C to all processes itself."""
        if self.popen and self.code is None and (os.name == "posix" or number != signal.SIGINT):
            self.popen.send_signal(number)

    def kill(self) -> None:
        if self.popen and self.code is None:
            self.popen.kill()
            self.popen.wait()

    def printed(self) -> str:
        """Its error as it printed it, without what libraries printed before."""
        text = self.errors.read_text(encoding="utf-8", errors="replace").strip()
        return text[text.rfind("\nERROR ") + 1 :]

    def gave_up(self, hung: Sequence[_Process]) -> bool:
        """Whether it ended because another one did, or did not answer. NCCL ends a process that waited for one of the hung
        with SIGABRT."""
        if self.code == ExitCode.PROCESS_LOST:
            return CONNECTION_LOST in self.printed() or not self.printed()
        words = self.errors.read_text(encoding="utf-8", errors="replace").lower()
        return bool(hung) and self.code == -getattr(signal, "SIGABRT", 6) and "watchdog" in words

    def error(self, count: int) -> UserError:
        """What it said of its end; the first process's words stand for all."""
        name, text = f"{self.rank} of the {count} processes", self.printed()
        known = self.code in set(ExitCode)
        if text.startswith("ERROR ") and known:
            return ErrorOfProcess(text, ExitCode(self.code), name if self.rank else "")
        return UserError(
            f"process {name} ended with exit code {self.code}, without a word of its own",
            why=text[-500:] or "a library ended it; train.log and rank*.log may say more",
            fix=shell_command(),
            code=ExitCode(self.code) if known else ExitCode.PROCESS_LOST,
        )


def _wait(processes: Sequence[_Process], trial: trials.Trial | None, received: list[int]) -> None:
    """Until all have ended. received: the signals that tell them to, as they come; one that a process alone has got, and
    the sweep's word, are added. Those that hang are killed: some seconds after another has failed, after the first, which
    alone has anything to save, has ended, or after they were told twice.
    """
    sent = 0
    deadlines: dict[str, float] = {}
    while running := [process for process in processes if process.code is None]:
        ended = [process.code for process in processes if process.code is not None]
        if not received and trial is not None and trial.interrupted:
            received.append(signal.SIGTERM)
        if not received:
            received += [STOPPED[code] for code in ended if code in STOPPED][:1]
        for number in received[sent:]:
            sent += 1
            for process in running:
                process.send(number)
        if processes[0].code is not None or any(code not in (0, *STOPPED) for code in ended):
            deadlines.setdefault("failed", time.monotonic() + GRACE_SECONDS)
        if sent > 1:
            deadlines.setdefault("told twice", time.monotonic() + AGAIN_SECONDS)
        if deadlines and time.monotonic() > min(deadlines.values()):
            for process in running:
                process.hung = True
                process.kill()
        time.sleep(0.05)


def _raise_failure(processes: Sequence[_Process], path: Path, received: Sequence[int]) -> None:
    """Raises what ended the run, if anything did: what happened first, not the broken connections that followed."""
    count = len(processes)
    again = f"{named(path.name)} # continues from the last checkpoint"
    hung = [process for process in processes if process.hung]
    ended = [process for process in processes if process.code and not process.hung]
    lost = [process for process in ended if process.gave_up(hung)]
    killed = [process for process in ended if process.code < 0 and process not in lost]
    causes = [process for process in ended if process.code > 0 and process.code not in STOPPED and process not in lost]
    stopped = received[0] if received else next((STOPPED[one.code] for one in ended if one.code in STOPPED), 0)
    causes.sort(key=lambda process: process.code == ExitCode.PROCESS_LOST)
    if causes and not (stopped and causes[0].code == ExitCode.PROCESS_LOST):
        raise causes[0].error(count)
    if stopped and (ended or hung):
        raise signals.error_of(stopped)
    if killed:
        number = -killed[0].code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        raise UserError(
            f"process {killed[0].rank} of the {count} processes was killed ({name})",
            where=str(path),
            why="the system does that when the machine's memory is full (`dmesg | tail`), and so does kill -9"
            if number == getattr(signal, "SIGKILL", 9)
            else killed[0].printed()[-500:] or "it crashed; train.log and rank*.log may say in what",
            fix=again,
            code=ExitCode.PROCESS_LOST,
        )
    if lost and hung:
        raise UserError(
            f"process {hung[0].rank} of the {count} processes no longer answered",
            where=str(path),
            why="the others waited for it for strategy.timeout_seconds and gave up; it hung, or was far too slow",
            fix=[again, corrected("strategy.timeout_seconds=600")],
            code=ExitCode.PROCESS_LOST,
        )
    if lost:
        raise lost[0].error(count)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def end_with(parent: int) -> None:
    """Ends this process soon after the one that started it, in whatever way that ended: nobody else would.

    Windows keeps the number of a parent that is gone; there the broken connections between the processes end them."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(ExitCode.PROCESS_LOST)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True, name="end_with_parent").start()


def claim_path(config: Config) -> Path:
    """The folder of the run. Processes that torchrun started have no name= in common sooner than they have met: without
    one, theirs is that of the launch, or else the first process chooses it and tells the others (src/run.py)."""
    name = config.name
    if launched_from_outside() and name is None:
        launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # --rdzv-id
        if launch == "none" and os.environ["RANK"] != "0":
            return Path(config.runs_dir)
        name = launch if launch != "none" else None
    return claim(Path(config.runs_dir), name)
