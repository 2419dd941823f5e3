"""The Ray that a sweep starts for itself: nobody else can use it, and its folder fits and is gone afterwards."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from src.engine.runs.errors import ExitCode, Terminated, UserError
from src.engine.sweeps import cluster
from src.engine.sweeps.ray_environment import own_handlers
from tests.conftest import command_environment

OWNER = """
import os, sys
from src.engine.sweeps.ray_environment import quiet_ray
quiet_ray(None)
import ray
from src.engine.sweeps.cluster import connect
from src.engine.sweeps.settings import Ray
connect(Ray())
node = ray.get_runtime_context()
print(node.gcs_address, os.environ["RAY_AUTH_TOKEN"], node.get_session_name(), flush=True)
sys.stdin.readline()
"""
STRANGER = """
import ray, sys
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("RAN", ray.get(ray.remote(lambda: 7).remote()))
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process with a Ray of its own, under a TMPDIR whose path is too long for sockets."""
    long = tmp_path / ("long" * 20)
    long.mkdir()
    environment = {name: value for name, value in command_environment().items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=environment | {"TMPDIR": str(long), "HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(timeout=60)


def test_only_the_command_itself_can_run_code_on_its_ray(owner, tmp_path):
    address, token, session = owner.stdout.readline().split()
    if ipaddress.ip_address(address.partition(":")[0]).is_loopback:
        pytest.skip("this machine has no other address, so Ray is out of reach for other machines anyway")
    private = next(Path("/tmp").glob(f"ray*/r/{session}")).parent.parent
    assert private.stat().st_mode & 0o077 == 0, "other users of the machine could exchange its sockets"
    assert not (tmp_path / ".ray").exists(), "no token is written where others could read it"

    def stranger(**authentication: str) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        words = [sys.executable, "-c", STRANGER, address]
        return subprocess.Popen(
            words,
            env=environment | {"HOME": str(tmp_path / "other")} | authentication,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    without = stranger(RAY_AUTH_MODE="disabled")
    wrong = stranger(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    # The control: with the token the same lines do run.
    assert "RAN 7" in stranger(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token).communicate(timeout=60)[0]
    for refused in (without, wrong):
        said = refused.communicate(timeout=60)[0]
        assert refused.returncode != 0, said
        assert "RAN" not in said
        assert "InvalidAuthToken" in said

    owner.stdin.close()
    owner.wait(timeout=60)
    assert not private.exists()


def test_a_folder_for_the_sockets_that_cannot_be_is_refused_with_another(monkeypatch, tmp_path):
    for wrong, why in ((f"/tmp/{'long' * 20}", "107 bytes"), (str(tmp_path)[:5] + "missing", "No such file")):
        monkeypatch.setenv("RAY_TMPDIR", wrong)
        with pytest.raises(UserError, match="no folder for its sockets") as error:
            cluster._temporary_folder()
        assert error.value.code == ExitCode.UNAVAILABLE
        assert why in error.value.why
        assert error.value.fix[0].startswith("RAY_TMPDIR=/tmp ")


@pytest.mark.parametrize("error", [Exception("The current node timed out during startup."), OSError(28, "No space")])
def test_whatever_keeps_ray_from_starting_is_said_with_what_to_do(monkeypatch, error):
    """Ray raises exceptions of no kind."""

    def refuse(**words: object) -> None:
        raise error

    monkeypatch.setattr(cluster.ray, "init", refuse)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="Ray could not be started") as caught:
        cluster.connect(cluster.Ray())
    assert caught.value.code == ExitCode.UNAVAILABLE
    assert "space" in caught.value.why.lower() or "timed out during startup" in caught.value.why
    assert len(caught.value.fix) == 2


@pytest.mark.parametrize("arrives", [True, False])
def test_sigterm_while_ray_is_imported_or_starts_ends_as_ever(arrives):
    """Its own handlers end the process with 15 or 1."""
    before = signal.getsignal(signal.SIGTERM)

    def start() -> None:
        with own_handlers():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
            if arrives:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated) if arrives else nullcontext():
        start()
    assert signal.getsignal(signal.SIGTERM) is before
