"""Two hosts on one machine: network namespaces with a cable between them and the same disk. For root on Linux."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.conftest import ROOT, command_environment

INTERFACE = "eth0"


def shell_environment() -> dict[str, str]:
    """The environment of a user's shell with the virtual environment activated: the scripts call `python`."""
    return command_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


class Host:
    """One of the two: its own interfaces and ports, and the processes that were started on it."""

    def __init__(self, namespace: str, address: str) -> None:
        self.namespace, self.address = namespace, address

    def start(self, folder: Path, head: Host, *words: str, **environment: str) -> subprocess.Popen[str]:
        """scripts/launch_torchrun.sh with these words; what it prints goes to folder/NAMESPACE.log."""
        meeting = {"NNODES": "2", "HEAD": head.address, "IFNAME": INTERFACE}
        with self.log(folder).open("w") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, str(ROOT / "scripts/launch_torchrun.sh"), *words],
                cwd=folder,
                stdout=log,
                stderr=log,
                env=shell_environment() | meeting | environment,
            )

    def log(self, folder: Path) -> Path:
        return folder / f"{self.namespace}.log"

    def processes(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def workers(self) -> list[int]:
        """The processes that train."""
        return [
            pid for pid in self.processes() if "src.train" in _words(pid) and "torch.distributed.run" not in _words(pid)
        ]

    def lose_power(self) -> None:
        """Everything on it ends, and nobody is told: no connection is closed."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")
        self.kill()

    def kill(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other; afterwards neither they nor their processes are left."""
    name = f"hosts-{secrets.token_hex(3)}"
    hosts = [Host(f"{name}-{number}", f"10.77.0.{number}") for number in (1, 2)]
    made: list[Host] = []
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            made.append(host)
        ends = [["name", INTERFACE, "netns", host.namespace] for host in hosts]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield hosts[0], hosts[1]
    finally:
        for host in made:
            host.kill()
            _ip("netns", "delete", host.namespace)


def why_not() -> str | None:
    """Why there can be no two hosts here, if so."""
    if shutil.which("ip") is None:
        return "no ip (package iproute2)"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
