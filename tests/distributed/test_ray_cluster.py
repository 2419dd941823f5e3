"""Sweeps on a Ray cluster of two raylets, which are two machines as far as Ray knows: a trial on both, and one that is lost."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.engine.sweeps.sweep_journal import FINISHED, Journal
from tests.conftest import ROOT, SMALL
from tests.running import start
from tests.warm import command_environment

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for raylets in /proc")

# Only this test's own processes may use the cluster.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
SWEEP = ("-m", "hydra/launcher=ray_tune", *SMALL, "trainer.accelerator=cpu")


def start_node(*words: str) -> subprocess.Popen[str]:
    """A raylet with one core. Returns when it has joined its cluster; it ends with the process."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--num-cpus=1",
            "--disable-usage-stats",
            *words,
        ],
        env=command_environment() | TOKEN,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    while "Ray runtime started" not in "".join(said):
        said.append(process.stdout.readline())
        assert said[-1], "".join(said)
    return process


def end(node: subprocess.Popen[str]) -> None:
    node.terminate()
    try:
        node.wait(timeout=30)
    finally:
        node.kill()


def raylet_of(node: subprocess.Popen[str]) -> int:
    """The process that is the machine to Ray."""
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Starts the first machine. Yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:  # not of the range that Ray gives to its workers
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        port = address.partition(":")[2]
        node = start_node(
            "--head",
            "--num-gpus=1",  # as far as Ray knows; the trials of most tests ask for none
            "--include-dashboard=false",
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
            f"--temp-dir={folder}",
        )
        yield address
        end(node)


@pytest.fixture
def second(head) -> Iterator[subprocess.Popen[str]]:
    """Starts the second machine."""
    node = start_node(f"--address={head}", "--node-ip-address=127.0.0.1")
    yield node
    end(node)


def test_a_trial_trains_on_two_machines(tmp_path, head, second):
    words = ("strategy=ddp", "trainer.num_nodes=2", "name=both")
    sweep = start(tmp_path, *SWEEP, *words, f"hydra.launcher.ray.init.address={head}", **TOKEN)
    out, err = sweep.communicate(timeout=240)
    assert sweep.returncode == 0, out + err
    (trial,) = Journal(tmp_path / "runs/both").trials.values()
    assert (trial.state, sorted(trial.rows)) == (FINISHED, [1, 2])
    log = (tmp_path / "runs/both/0/train.log").read_text()
    assert "on 2 x cpu" in log, log


SEEN = """
import os
import time
from pathlib import Path

import hydra

from src.engine.sweeps import settings

def job(config):
    me = Path(f"{config.gpu} {config.seed}")
    me.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    deadline = time.monotonic() + 60
    while not Path(f"{config.gpu} {1 - config.seed}").exists():  # until the other one has begun
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return 1.0

if __name__ == "__main__":
    settings.register()
    hydra.main(version_base="1.3", config_path=str(Path("conf").absolute()), config_name="app")(job)()
"""


def test_two_trials_share_a_gpu_and_those_without_one_see_none(tmp_path, head):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text(f"gpu: 0\nseed: 0\nhydra: {{searchpath: ['file://{ROOT}/conf']}}\n")
    (tmp_path / "app.py").write_text(SEEN)
    words = ("gpu=0,0.5", "seed=0,1", "hydra.launcher.resources.cpu=0.25", "hydra.launcher.resources.gpu=${gpu}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "app", "-m", "hydra/launcher=ray_tune", *words, "hydra.sweep.dir=sweep"),
            f"hydra.launcher.ray.init.address={head}",
        ],
        cwd=tmp_path,
        env=command_environment() | TOKEN,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = {path.name: path.read_text() for path in tmp_path.glob("0* [01]")}
    assert seen == {"0 0": "", "0 1": "", "0.5 0": "0", "0.5 1": "0"}


def in_training(sweep: Path) -> set[int]:
    """The trials that have reported, and are not at their end."""
    journal = sweep / "trials.jsonl"
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    of = {kind: {event["trial"] for event in events if event["event"] == kind} for kind in ("row", "ended")}
    return of["row"] - of["ended"]


def test_the_trials_of_a_lost_machine_go_on_elsewhere(tmp_path, head, second):
    words = ("trainer.max_epochs=8", "optimizer.lr=0.0001,0.001,0.01,0.03", "name=lost")
    sweep = start(tmp_path, *SWEEP, *words, f"hydra.launcher.ray.init.address={head}", **TOKEN)
    while len(in_training(tmp_path / "runs/lost")) < 2:
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.05)
    os.kill(raylet_of(second), signal.SIGKILL)
    out, err = sweep.communicate(timeout=240)
    assert sweep.returncode == 0, out + err
    assert "it goes on in a new one" in out + err
    trials = Journal(tmp_path / "runs/lost").trials
    assert [(trial.state, sorted(trial.rows)) for trial in trials.values()] == [(FINISHED, list(range(1, 9)))] * 4
