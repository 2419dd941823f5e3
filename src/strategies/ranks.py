"""The processes of a run and what they do together outside of a training step: meet, compare, wait for the first.

run.py is the same program in every process. `joined` makes it one of several where the environment says so (torchrun's
variables, which src/strategies/launching.py sets too); otherwise it is alone, and everything here does nothing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from src.config import Config
from src.errors import ExitCode, UserError
from src.run_dir import flat
from src.user_command import corrected, shell_command

Result = TypeVar("Result")

DEFAULT_TIMEOUT_SECONDS = 120.0
LONG = timedelta(days=7)  # the first process may check a million pictures while the others wait


@dataclass
class Ranks:
    """This process among those of the run, and among those of its machine (local)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: dist.Store | None = None
    _keys: Iterator[int] = field(default_factory=count)

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
        else:
            self.store.wait([key], LONG)
        return json.loads(self.store.get(key))

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
            host, theirs = json.loads(self.store.get(f"{name}/{other}"))
            changed = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
            if changed:
                shown = [
                    f"{key}: {mine.get(key)} in process {self.rank}, {theirs.get(key)} in {other}" for key in changed
                ]
                raise UserError(
                    f"process {self.rank} and process {other} were started with different {what}",
                    where=f"process {self.rank} on {socket.gethostname()}, process {other} on {host}",
                    why="\n".join(shown[:4]),
                    fix="start the same command on every machine, in the same commit, with the same pictures",
                )


@contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """Inside, this process is one of those of the run. Raises UserError where they do not meet, or one is lost."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    seconds = config.strategy.timeout_seconds or DEFAULT_TIMEOUT_SECONDS
    timeout = timedelta(seconds=seconds)
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu")
    with _losses_explained(seconds):
        try:
            store, rank, world = next(rendezvous("env://", timeout=timeout))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # It outlives a restart, and the keys of the try before must not be read again. Several machines do not
                # count their restarts alike, so scripts/launch_torchrun.sh gives each try a store of its own.
                store = dist.PrefixStore(f"try/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            group = dist.PrefixStore("group", store)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=group, rank=rank, world_size=world, timeout=timeout
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise _not_met(error, seconds) from error
        local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        try:
            yield Ranks(rank, world, local_rank, local_world, store)
        finally:
            leave()


def leave() -> None:
    """Ends the connections to the other processes; what follows is done alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _not_met(error: Exception, seconds: float) -> UserError:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return UserError(
            f"port {port} is in use",
            where=f"{address}:{port}, where the processes of this run would meet",
            why="another program, or another run, listens there",
            fix=[corrected("strategy.port=null") + " # takes a free one", f"ss -ltnp | grep {port}"],
            code=ExitCode.BUSY,
        )
    return UserError(
        f"process {os.environ['RANK']} did not meet the others within {seconds:g} seconds",
        where=f"{address}:{port}",
        why=f"some did not start, or a firewall is between the machines; {str(error).splitlines()[0][:200]}",
        fix=f"nc -vz {address} {port} # from each machine, while the run starts on the first",
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
            "the connection to another process of this run is lost",
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
