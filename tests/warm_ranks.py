"""Ranks of a warm command (tests/warm.py): forks of it that wait, with the libraries and nothing of src/ imported, until
src/engine/processes/launching.py starts `python -m src.rank`. Importing the libraries is most of a short run's work.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LONGEST = 2**16  # request in bytes
# Variables in which a rank's environment may differ from its command's: no library reads them at import.
OF_RANKS = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TRAIN_COMMAND", "RANKS_STORE", "MASTER_ADDR",
    "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HYDRA_FULL_ERROR",
}  # fmt: skip

Become = Callable[[str, list[str], str, dict[str, str], dict[int, int]], None]  # never returns


def expected(words: Sequence[str]) -> int:
    """How many ranks `python -m src.NAME words...` will probably start."""
    line = " ".join(words)
    if "strategy=ddp" not in line:
        return 0
    devices = re.search(r"trainer\.devices=(\d)\b", line)
    return int(devices[1]) if devices else 0


def prepare(count: int, become: Become) -> None:
    """Forks `count` processes, and has subprocess.Popen use them for ranks. become: what a fork does to be a command."""
    if not count:
        return
    waiting = [_fork(become) for _ in range(count)]
    environment = dict(os.environ)

    class Popen(subprocess.Popen):  # type: ignore[type-arg] # a class, for those who take it as a base
        def __new__(cls, command: Any, *args: Any, **settings: Any) -> Any:
            if command[1:3] == ["-m", "src.rank"] and waiting and _fits(settings["env"], environment):
                return _Rank(*waiting.pop(0), command[3:], settings)
            return super().__new__(cls)

    subprocess.Popen = Popen  # type: ignore[misc]


def _fits(environment: dict[str, str], before: dict[str, str]) -> bool:
    return {name for name, _ in environment.items() ^ before.items()} <= OF_RANKS


def _fork(become: Become) -> tuple[int, socket.socket]:
    """The process, which ends with this one, and the connection to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = os.fork()
    if process:
        theirs.close()
        return process, ours
    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command and all that wait
    request, files, _, _ = socket.recv_fds(theirs, LONGEST, 3)
    if not request:
        os._exit(0)
    theirs.close()
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words, environment = json.loads(request)
    become("src.rank", words, str(Path.cwd()), environment, dict(zip(files, (0, 1, 2), strict=True)))
    raise AssertionError("a command ends by itself")


class _Rank:
    """The part of subprocess.Popen that src/engine/processes/launching.py uses."""

    def __init__(self, pid: int, connection: socket.socket, words: list[str], settings: dict[str, Any]) -> None:
        self.pid, self.returncode = pid, None
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "wb")
        discarded = os.open(os.devnull, os.O_WRONLY)
        stdout = settings["stdout"]
        out = 1 if stdout is None else discarded if stdout == subprocess.DEVNULL else stdout.fileno()
        request = json.dumps([words, settings["env"]]).encode()
        socket.send_fds(connection, [request], [read, out, settings["stderr"].fileno()])
        connection.close()
        os.close(read)
        os.close(discarded)

    def poll(self) -> int | None:
        return self._waited(os.WNOHANG)

    def wait(self) -> int | None:
        return self._waited(0)

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            process, status = os.waitpid(self.pid, options)
            if process:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
