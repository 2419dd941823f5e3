"""Starts the ranks of a run (strategy=ddp), watches over them, and names the one that failed.

Every rank is a `python -m src.rank` with the composed config of this job: the command line does not
run again, so a sweep starts the ranks of each of its jobs and no others. The command itself trains nothing, and imports
no torch, so that it can always hand on Ctrl-C and SIGTERM, and name a rank that died. If the command dies, its ranks
notice and end.

The ranks of one machine meet through a file in a private folder: no port is open to other users, and the connections of
gloo and NCCL use the loopback interface.

Under torchrun (or SLURM through it) the ranks are `python -m src.train` themselves, and only launch_checks.py is used.
Both ways the environment variables are torchrun's.
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
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

import yaml

from src.engine import features
from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected, named, shell_command
from src.engine.memory.gpus import device_count
from src.engine.runs import signals
from src.engine.runs.errors import ErrorOfProcess, ExitCode, UserError
from src.engine.runs.run_dir import RunFolder
from src.engine.runs.run_names import claim

log = logging.getLogger(__name__)

CONNECTION_LOST = "the connection to another process of this run is lost"
STORE = "RANKS_STORE"  # environment: the file through which the processes of one machine meet
GRACE_SECONDS = 5.0  # for the other ranks to end by themselves after one has failed
AGAIN_SECONDS = 20.0  # for all ranks to end after a second signal
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # name of the loopback interface
STOPPED: dict[int | None, signal.Signals] = {
    ExitCode.TERMINATED: signal.SIGTERM,
    ExitCode.INTERRUPTED: signal.SIGINT,
}  # exit code -> the signal behind it


def processes_to_start(config: Config) -> int:
    """Number of ranks that this command starts on this machine; 0: it trains by itself."""
    if launched_from_outside() or not features.process_per_device(config.strategy.name):
        return 0
    count = device_count(config.trainer)
    return count if count * config.trainer.num_nodes > 1 else 0


def launched_from_outside() -> bool:
    """Whether torchrun or the like started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_in_processes(config: Config, path: Path, count: int, rehearsal: IO[bytes] | None = None) -> float:
    """Runs `count` ranks on this machine; returns the metric that chose the best epoch.

    rehearsal: the ranks rehearse (src/run.py) instead of running to the end, and what rank 0 prints goes there.
    In a trial of a sweep the machine may be one of several (`Place`), of which all but the first return nan. Raises the
    UserError of the rank that failed, or Terminated or KeyboardInterrupt if a signal ended the run.
    """
    folder = RunFolder(path, {})
    supervisor = features.supervisor()
    place = supervisor.place if supervisor else features.Place()
    received: list[int] = []  # signals: an exception in the middle of anything would leave ranks behind
    with ExitStack() as stack:
        stack.enter_context(signals.handled_by(lambda number, _: received.append(number)))
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ranks-")))
        environment = stack.enter_context(supervisor.answering_processes()) if supervisor else {}
        processes = [_Process(local_rank, count, place, environment, private) for local_rank in range(count)]
        try:
            job = yaml.safe_dump({"config": asdict(config), "path": str(path), "parent": os.getpid()})
            for process in processes:
                process.start(job, rehearsal)
            _wait(processes, supervisor, received)
        finally:
            for process in processes:
                process.kill()
        try:
            _raise_failure(processes, path, received)
        except UserError as error:
            # With other codes rank 0 has noted its end itself, or has found that the folder is another command's.
            if error.code == ExitCode.PROCESS_LOST:
                folder.note_death(error)
            raise
    if place.node > 0:
        return math.nan
    metrics = json.loads((path / "result.json").read_text(encoding="utf-8"))["metrics"]
    return metrics.get(config.checkpoint.monitor, math.nan)


def meeting_point(private: Path) -> dict[str, str]:
    """The variables by which the ranks of one machine find each other; what the user has set comes before the interface."""
    interface = LOOPBACK.get(sys.platform)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ()  # else they listen on a network's address
    return {STORE: str(private / "store"), **{name: os.environ.get(name, interface or "") for name in names}}


class _Process:
    """A rank and its stderr. private: a folder that only this user can read."""

    def __init__(
        self, local_rank: int, count: int, place: features.Place, environment: dict[str, str], private: Path
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
            self.environment |= meeting_point(private)
        self.hung = False  # whether it had to be killed
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self, job: str, rehearsal: IO[bytes] | None) -> None:
        with self.errors.open("wb") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "src.rank", *(["rehearsal"] if rehearsal else [])],
                stdin=subprocess.PIPE,
                stdout=rehearsal if self.rank == 0 else subprocess.DEVNULL,  # other ranks have rank1.log, ...
                stderr=errors,
                env=self.environment,
                process_group=0 if os.name == "posix" else None,  # so that Ctrl-C reaches this command alone
            )
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError), self.popen.stdin as pipe:  # a signal may end it before it reads
            pipe.write(job.encode())

    @property
    def code(self) -> int | None:
        """As in subprocess: None while it runs, -N if signal N killed it. But where SIGINT or SIGTERM came before the rank
        could handle it, the exit code of a rank that could."""
        code = self.popen.poll() if self.popen else None
        if code is None:
            return None
        if 128 < code < 160 and code not in STOPPED:
            return 128 - code  # from a shell between this command and the rank
        return signals.code_of(-code) if -code in signals.NUMBERS else code

    def send(self, number: int) -> None:
        """Sends a signal, except Ctrl-C on Windows, whose console sends it to all processes itself."""
        if self.popen and self.code is None and (os.name == "posix" or number != signal.SIGINT):
            self.popen.send_signal(number)

    def kill(self) -> None:
        if self.popen and self.code is None:
            self.popen.kill()
            self.popen.wait()

    def printed(self) -> str:
        """The error that it printed, without the output of libraries before it."""
        text = self.errors.read_text(encoding="utf-8", errors="replace").strip()
        return text[text.rfind("\nERROR ") + 1 :]

    def gave_up(self, hung: Sequence[_Process]) -> bool:
        """Whether it ended because another rank died or hung; NCCL ends a rank that waits for a hung one with SIGABRT."""
        if self.code == ExitCode.PROCESS_LOST:
            return CONNECTION_LOST in self.printed() or not self.printed()
        words = self.errors.read_text(encoding="utf-8", errors="replace").lower()
        return bool(hung) and self.code == -getattr(signal, "SIGABRT", 6) and "watchdog" in words

    def error(self, count: int) -> UserError:
        """The error that it printed. An error of rank 0 is shown as that of the run."""
        name, text = f"{self.rank} of the {count} processes", self.printed()
        is_ours = self.code in set(ExitCode)
        if text.startswith("ERROR ") and is_ours:
            return ErrorOfProcess(text, ExitCode(self.code), name if self.rank else "")
        return UserError(
            f"process {name} ended with exit code {self.code}, without a word of its own",
            why=text[-500:] or "a library ended it; train.log and rank*.log may say more",
            fix=shell_command(),
            code=ExitCode(self.code) if is_ours else ExitCode.PROCESS_LOST,
        )


def _wait(processes: Sequence[_Process], supervisor: features.Supervisor | None, received: list[int]) -> None:
    """Waits until all ranks have ended, and hands on signals.

    received: grows while signals arrive; a signal that only a rank got, and the sweep's request to end, are added. Ranks
    that hang are killed: GRACE_SECONDS after another rank has failed or rank 0, which alone saves anything, has ended; and
    AGAIN_SECONDS after a second signal.
    """
    sent, deadline = 0, math.inf
    while running := [process for process in processes if process.code is None]:
        ended = [process.code for process in processes if process.code is not None]
        if not received and supervisor is not None and supervisor.interrupted:
            received.append(signal.SIGTERM)
        if not received:
            received += [STOPPED[code] for code in ended if code in STOPPED][:1]
        for number in received[sent:]:
            sent += 1
            for process in running:
                process.send(number)
        if processes[0].code is not None or any(code not in (0, *STOPPED) for code in ended):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if sent > 1:
            deadline = min(deadline, time.monotonic() + AGAIN_SECONDS)
        if time.monotonic() > deadline:
            for process in running:
                process.hung = True
                process.kill()
        time.sleep(0.05)


def _raise_failure(processes: Sequence[_Process], path: Path, received: Sequence[int]) -> None:
    """Raises the error that ended the run, if any: the cause, and not the broken connections that followed."""
    count = len(processes)
    again = f"{named(path.name)} # continues from the last checkpoint"
    hung = [process for process in processes if process.hung]
    ended = [process for process in processes if process.code and not process.hung]
    lost = [process for process in ended if process.gave_up(hung)]
    killed = [process for process in ended if process.code < 0 and process not in lost]
    causes = [process for process in ended if process.code > 0 and process.code not in STOPPED and process not in lost]
    signalled = [STOPPED[process.code] for process in ended if process.code in STOPPED]
    stopped = next(iter([*received, *signalled]), 0)
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
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def claim_path(config: Config) -> Path:
    """The folder of the run. Without name=, ranks that torchrun started take the name of the launch (--rdzv-id); without
    that, rank 0 chooses a name and tells the others when they have met (ranks.open_folder)."""
    name = config.name
    if launched_from_outside() and name is None:
        launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        if launch == "none" and os.environ["RANK"] != "0":
            return Path(config.runs_dir)
        name = launch if launch != "none" else None
    return claim(Path(config.runs_dir), name)
