"""The processes of a run and what they do together outside of a training step: meet, compare, wait for the first.

run.py is the same program in every process. `joined` makes it one of several where the environment says so (torchrun's
variables, which src/strategies/launching.py sets too); otherwise it is alone, and everything here does nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from src.config import Config
from src.errors import ExitCode, Terminated, UserError
from src.out_of_memory import free
from src.run_settings import flat
from src.strategies.launching import CONNECTION_LOST, STORE
from src.user_command import corrected, shell_command

Result = TypeVar("Result")

DEFAULT_TIMEOUT_SECONDS = 120.0
BEAT_SECONDS, FAREWELL_SECONDS = 5.0, 10.0


@dataclass
class Ranks:
    """This process among those of the run, and among those of its machine (local)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: dist.Store | None = None
    seconds: float = DEFAULT_TIMEOUT_SECONDS  # after which a silent process is given up
    _keys: Iterator[int] = field(default_factory=count)
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def told_by_first(self, work: Callable[[], Result]) -> Result:
        """The first process does the work, and all get its result, which is made of JSON's values."""
        if self.store is None:
            return work()
        key = f"told/{next(self._keys)}"
        if self.is_first:
            self.store.set(key, json.dumps(work()))
        return json.loads(self._get(key))

    def after_first(self, work: Callable[[], Result]) -> Result:
        """All do the work, the first before the others, which find on the disk what it kept there."""
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
        mine, name = flat(values), f"same/{next(self._keys)}"
        self.store.set(f"{name}/{self.rank}", json.dumps([socket.gethostname(), mine], default=str))
        mine = json.loads(json.dumps(mine, default=str))
        for other in range(self.world):
            host, theirs = json.loads(self._get(f"{name}/{other}"))
            changed = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
            if changed:
                shown = [
                    f"{key}: {mine.get(key)} in process {self.rank}, {theirs.get(key)} in {other}" for key in changed
                ]
                raise UserError(
                    f"process {self.rank} and process {other} were started with different {what}",
                    where=f"process {self.rank} on {socket.gethostname()}, process {other} on {host}",
                    why="\n".join(shown[:4]),
                    fix="start the same command on every machine, in the same commit, with the same images",
                )

    def _get(self, key: str) -> bytes:
        """Another process may list a million images before it says this. Asked again and again, since a signal cannot be
        answered while torch waits."""
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
        """Ends the connections after training; returns whether this process goes on alone to measure and to package.

        On several machines the others wait here until it has ended, with the memory of their GPU given back: torchrun ends
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

    def say_farewell(self, how: str) -> None:
        """how: the name of the error that ends this process, or None. The store may be in the first process: where there
        are several machines it stays until the others have read what they wait for."""
        self._over.set()
        if self.world == self.local_world:
            return
        with suppress(RuntimeError):
            self.store.set("ended" if self.is_first else f"farewell/{self.rank}", how)
            deadline = time.monotonic() + FAREWELL_SECONDS
            others = [f"farewell/{other}" for other in range(1, self.world)]
            while self.is_first and not self.store.check(others) and time.monotonic() < deadline:
                time.sleep(0.1)


@contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """Inside, this process is one of those of the run. Raises UserError where they do not meet, or one is lost."""
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
            store = _store(world, timeout)
            ranks = Ranks(rank, world, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), store, seconds)
            ranks.meet()
            group = dist.PrefixStore("group", store)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=group, rank=rank, world_size=world, timeout=timeout
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise _not_met(error, seconds) from error
        how = "None"
        try:
            yield ranks
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            disconnect()
            ranks.say_farewell(how)


def _store(world: int, timeout: timedelta) -> dist.Store:
    """Where the processes leave each other messages. On one machine it is a file in a folder that only its user can read,
    so that nothing listens and no port can be taken."""
    if STORE in os.environ:
        return dist.FileStore(os.environ[STORE], world)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It outlives a restart, and the keys of the try before must not be read again. Several machines do not count
        # their restarts alike, so scripts/launch_torchrun.sh gives each try a store of its own.
        store = dist.PrefixStore(f"try/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def disconnect() -> None:
    """Ends the connections to the other processes; what follows is done alone."""
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
    return UserError(
        f"process {os.environ['RANK']} did not meet the others within {seconds:g} seconds",
        where=where,
        why=why,
        fix=fix,
        code=ExitCode.PROCESS_LOST,
    )


@contextmanager
def _losses_explained(seconds: float) -> Iterator[None]:
    """Inside, an error that came of the death or the silence of another process says so."""
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
    """Whether an exchange between processes failed, which is not the mistake of this one."""
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "caused pair closure", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
