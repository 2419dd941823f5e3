"""What the processes of a run on one machine listen on: from another process, over an address of the machine that others
reach, nothing of it can be connected to."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.conftest import SMALL
from tests.distributed.test_ddp import DDP
from tests.distributed.test_lost_processes import ends, environment_of, processes_of, ranks
from tests.running import start, wait_for_save

LISTENS = "0A"  # in /proc/net/tcp

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks for sockets in /proc"),
]


def outer_address() -> str | None:
    """An address of this machine that is not the loopback's; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect(("192.0.2.1", 1))
        except OSError:
            return None
        address = way.getsockname()[0]
    return None if address.startswith("127.") else address


def listening(pids: list[int]) -> set[int]:
    """The TCP ports that these processes listen on."""
    inodes: set[str] = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                inodes |= set(re.findall(r"socket:\[(\d+)\]", str(handle.readlink())))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and words[9] in inodes:
                ports.add(int(words[1].rpartition(":")[2], 16))
    return ports


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def test_nothing_of_a_run_listens_beyond_its_machine(tmp_path):
    address = outer_address()
    if address is None:
        pytest.skip("this machine has no address but the loopback's")
    default = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torch's, to compare with
    default.set("secret", "known")
    assert default.port in listening([os.getpid()])
    assert answers(address, default.port)
    assert dist.TCPStore(address, default.port, is_master=False, wait_for_workers=False).get("secret") == b"known"

    process = start(tmp_path, *SMALL, *DDP, "trainer.max_epochs=50", "checkpoint.every_n_steps=1", "name=private")
    try:
        assert wait_for_save(tmp_path / "runs" / "private", after_epoch=0, process=process)
        ports = listening(list(processes_of(tmp_path)))
        assert ports, "gloo's are not seen"
        assert [port for port in ports if answers(address, port)] == []
        store = Path(environment_of(ranks(tmp_path)[1])["RANKS_STORE"])
        assert stat.S_IMODE(store.parent.stat().st_mode) == 0o700
        assert store.exists()
    finally:
        process.send_signal(signal.SIGTERM)
        ends(process, tmp_path, seconds=30)
    assert not store.parent.exists()
