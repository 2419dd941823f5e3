"""The ranks of a run and what they do together outside of a training step: meet, compare, open the folder, wait for the first.

run.py is the same program in every process. Torchrun's environment variables, which src/engine/processes/launching.py sets too,
make a process one of several in `joined`; a process without them is alone, and nothing here waits.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected, shell_command
from src.engine.memory.out_of_memory import free
from src.engine.processes.launching import CONNECTION_LOST, STORE
from src.engine.runs import logs
from src.engine.runs.errors import ExitCode, Terminated, UserError
from src.engine.runs.run_dir import RunFolder
from src.engine.runs.run_settings import flat

Result = TypeVar("Result")

DEFAULT_TIMEOUT_SECONDS = 120.0
BEAT_SECONDS, FAREWELL_SECONDS = 5.0, 10.0


@dataclass
class Ranks:
    """This process among those of the run, and among those of its machine (local). store: None where it is alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: dist.Store = None  # type: ignore[assignment]
    seconds: float = DEFAULT_TIMEOUT_SECONDS  # after which a silent process is given up
    _keys: Iterator[int] = field(default_factory=count)
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def told_by_first(self, work: Callable[[], Result]) -> Result:
        """Rank 0 does the work, and all ranks get its result, which consists of JSON values."""
        if self.store is None:
            return work()
        key = f"told/{next(self._keys)}"
        if self.is_first:
            self.store.set(key, json.dumps(work()))
        return json.loads(self._get(key))

    def after_first(self, work: Callable[[], Result]) -> Result:
        """All ranks do the work, rank 0 before the others, so that they find its files on the disk."""
        if self.is_first:
            result = work()
            self.told_by_first(lambda: None)
            return result
        self.told_by_first(lambda: None)
        return work()

    def check_same(self, what: str, values: dict[str, Any]) -> None:
        """Raises UserError, in all processes, unless all were given the same values."""
        if self.store is None:
            return
        name, host = f"same/{next(self._keys)}", socket.gethostname()
        text = json.dumps([host, flat(values)], default=str)
        self.store.set(f"{name}/{self.rank}", text)
        mine = json.loads(text)[1]
        for other in range(self.world):
            other_host, theirs = json.loads(self._get(f"{name}/{other}"))
            changed = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)][:4]
            if changed:
                lines = [
                    f"{key}: {mine.get(key)} in process {self.rank}, {theirs.get(key)} in {other}" for key in changed
                ]
                raise UserError(
                    f"process {self.rank} and process {other} were started with different {what}",
                    where=f"process {self.rank} on {host}, process {other} on {other_host}",
                    why="\n".join(lines),
                    fix="start the same command on every machine, in the same commit, with the same images",
                )

    def _get(self, key: str) -> bytes:
        """Waits without end, since another process may list a million images before it sets the key; by asking again and
        again, since no signal is answered while torch waits."""
        pause = 0.01
        while not self.store.check([key]):
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
        return self.store.get(key)

    def meet(self) -> None:
        """Waits until every process is here, so that what torch does next takes no time."""
        self.store.set(f"here/{self.rank}", "")
        deadline = time.monotonic() + self.seconds
        for other in range(self.world):
            while not self.store.check([f"here/{other}"]):
                if time.monotonic() > deadline:
                    raise dist.DistStoreError(f"process {other} is missing")
                time.sleep(0.05)

    def leave(self) -> bool:
        """Ends the connections after training; returns whether this is rank 0, which measures and packages alone.

        On several machines the other ranks wait here until it has ended, with their GPU's memory given back: torchrun ends
        a launch 300 seconds after its first machine has ended (Agent's exit_barrier_timeout, which has no option)."""
        disconnect()
        if self.world > self.local_world:
            if self.is_first:
                threading.Thread(target=self._beat, daemon=True).start()
            else:
                free()
                self._wait_for_first()
        return self.is_first

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store may end before this process does
            self.store.add("beats", 1)
            while not self._over.wait(BEAT_SECONDS):
                self.store.add("beats", 1)

    def _wait_for_first(self) -> None:
        beats, heard = 0, time.monotonic()
        while not self.store.check(["ended"]):
            if (now := self.store.add("beats", 0)) != beats:
                beats, heard = now, time.monotonic()
            if time.monotonic() - heard > self.seconds + BEAT_SECONDS:
                raise dist.DistStoreError("process 0, which measures, is silent")
            time.sleep(0.5)
        how = self.store.get("ended").decode()
        if how in ("KeyboardInterrupt", "Terminated"):
            raise KeyboardInterrupt if how == "KeyboardInterrupt" else Terminated
        if how != "None":
            raise dist.DistStoreError(f"process 0 ended with {how}")

    def say_farewell(self, how: str, waits: bool = True) -> None:
        """Tells the other ranks how this one ends: the name of its error, or None. Rank 0, which may hold the store, waits
        on several machines until the others have read it."""
        self._over.set()
        if self.world == self.local_world:
            return
        with suppress(RuntimeError):
            self.store.set("ended" if self.is_first else f"farewell/{self.rank}", how)
            deadline = time.monotonic() + FAREWELL_SECONDS
            others = [f"farewell/{other}" for other in range(1, self.world)]
            while waits and self.is_first and not self.store.check(others) and time.monotonic() < deadline:
                time.sleep(0.1)


@contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """Inside, this process is one of the run's ranks. Raises UserError if they do not meet, or one is lost."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    seconds = config.strategy.timeout_seconds or DEFAULT_TIMEOUT_SECONDS
    timeout = timedelta(seconds=seconds)
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu")
    with _losses_explained(seconds):
        try:
            store = _store(rank, world, timeout)
            ranks = Ranks(rank, world, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), store, seconds)
            ranks.meet()
            group = dist.PrefixStore("group", store)
            backend = "nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=timeout)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise _not_met(error, seconds) from error
        how, is_lost = "None", False
        try:
            yield ranks
        except BaseException as error:
            how = type(error).__name__
            is_lost = isinstance(error, RuntimeError) and is_loss_of_a_process(error)
            raise
        finally:
            disconnect()
            # Nobody answers for a lost rank, and torchrun may end this process while it waits, before it has said why.
            ranks.say_farewell(how, waits=not is_lost)


def _store(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """The key-value store of all ranks. On one machine it is a file in a folder that only its user can read, so that no
    port is open or can be taken."""
    if STORE in os.environ:
        return dist.FileStore(os.environ[STORE], world)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(address, port, world, is_master=rank == 0, timeout=timeout)
    # torchrun's own store outlives a restart, and the keys of the try before must not be read again. Several machines do
    # not count their restarts alike, so scripts/launch_torchrun.sh gives each try a store of its own.
    store = dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"try/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def disconnect() -> None:
    """Ends the connections to the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _not_met(error: Exception, seconds: float) -> UserError:
    reason = str(error).splitlines()[0][:200]
    if STORE in os.environ:
        where, why = os.environ[STORE], f"some did not start, or start slowly; {reason}"
        fix = [corrected(f"strategy.timeout_seconds={5 * seconds:g}")]
    else:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        where, why = f"{address}:{port}", f"some did not start, or a firewall is between the machines; {reason}"
        fix = [f"nc -vz {address} {port} # from each machine, while the run starts on the first"]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            why, fix = "another program took this port meanwhile", [f"ss -ltnp | grep {port}", shell_command()]
    found = f"process {os.environ['RANK']} did not meet the others within {seconds:g} seconds"
    return UserError(found, where=where, why=why, fix=fix, code=ExitCode.PROCESS_LOST)


@contextmanager
def _losses_explained(seconds: float) -> Iterator[None]:
    """Inside, errors caused by the death or the silence of another rank become a UserError that says so."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss_of_a_process(error):
            raise
        raise UserError(
            CONNECTION_LOST,
            where=f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}",
            why=f"it ended, or it did not answer for {seconds:g} seconds (strategy.timeout_seconds); "
            f"{str(error).splitlines()[0][:200]}",
            fix=f"see what the other processes say, then repeat the command with its name= to continue: {shell_command()}",
            code=ExitCode.PROCESS_LOST,
        ) from error


def is_loss_of_a_process(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed, for a reason outside of this rank."""
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "caused pair closure", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


@contextmanager
def open_folder(ranks: Ranks, path: Path, config: dict[str, Any], resume: str) -> Iterator[RunFolder]:
    """Opens the run's folder, whose path rank 0 decides. Each rank has a log there.

    config: the whole config as plain values. Raises UserError if it differs between the ranks, if a rank does not see the
    folder, and for the reasons of RunFolder.open.
    """
    ranks.check_same("settings", config)
    path = Path(ranks.told_by_first(lambda: str(path)))
    with RunFolder.open(path, config, resume, writes=ranks.is_first) as folder:
        ranks.told_by_first(lambda: None)  # it exists from here on
        if not (path / "config.yaml").exists():
            raise UserError(
                f"{path} is not the same folder on all machines",
                where=f"{path.absolute()} on {platform.node()}",
                why="the first process has made it, and this one does not see it; all read the checkpoints in it",
                fix=corrected("runs_dir=/a/folder/that/all/machines/share"),
                code=ExitCode.NO_INPUT,
            )
        with logs.to_file(path / ("train.log" if ranks.is_first else f"rank{ranks.rank}.log")):
            yield folder
