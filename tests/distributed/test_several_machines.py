"""Two hosts for real: the same result as one process, a worker that is killed, a host that is lost."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src.engine.runs.reading import read_checkpoint
from tests.conftest import ROOT
from tests.distributed.test_ddp import LOSS, SAME, WEIGHT
from tests.distributed.two_hosts import Host, shell_environment, two_hosts, why_not
from tests.running import result, start, wait_for_save

CPU = (*SAME, "trainer.accelerator=cpu", "trainer.threads=1", "data.image_size=32", "memory.log=false")
DDP = (*CPU, "strategy=ddp", "trainer.devices=1")

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not torch.distributed.is_gloo_available(), reason="no bash, or a torch without gloo"
)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as pair:
        yield pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hosts share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """The run of two hosts, with that of one process beside it, in runs/single."""
    if reason := why_not():
        pytest.skip(reason)
    single = start(folder, *CPU, "name=single")
    with two_hosts() as (head, other):
        ends = [host.start(folder, head, *DDP, "name=undisturbed") for host in (head, other)]
        codes = [process.wait(timeout=120) for process in ends]
        printed = [host.log(folder).read_text() for host in (head, other)]
    out, err = single.communicate(timeout=60)
    assert codes == [0, 0], printed
    assert single.returncode == 0, out + err
    run = folder / "runs" / "undisturbed"
    assert (run / "rank1.log").exists(), "each host trained by itself"
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.slow
def test_they_train_what_one_process_trains(undisturbed):
    single = undisturbed.with_name("single")
    assert result(undisturbed)["steps"] == result(single)["steps"] == 20
    assert result(undisturbed)["metrics"] == pytest.approx(result(single)["metrics"], rel=LOSS)
    expected, found = weights(single), weights(undisturbed)
    assert list(found) == list(expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=WEIGHT, msg=key)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again_and_ends_with_the_same_weights(undisturbed, folder, hosts):
    run = folder / "runs" / "killed"
    words = (*DDP, "name=killed", "checkpoint.every_n_steps=1")
    processes = [host.start(folder, hosts[0], *words, RESTARTS="1") for host in hosts]
    saved = wait_for_save(run, 2, processes[0])
    assert saved, hosts[0].log(folder).read_text()
    [worker] = hosts[1].workers()
    os.kill(worker, signal.SIGKILL)
    codes = [process.wait(timeout=120) for process in processes]
    printed = hosts[0].log(folder).read_text()
    assert codes == [0, 0], printed
    assert "continuing from runs/killed/checkpoints/last.ckpt" in printed
    assert result(run)["steps"] == 20
    expected, found = weights(undisturbed), weights(run)
    assert all(torch.equal(found[key], expected[key]) for key in expected), "not the same to the bit"


@pytest.mark.slow
def test_a_host_that_is_lost_ends_the_run_with_an_error(folder, hosts):
    """It loses power: nobody closes its connections."""
    words = (*DDP, "name=lost", "checkpoint.every_n_steps=1", "strategy.timeout_seconds=10")
    processes = [host.start(folder, hosts[0], *words, RESTARTS="0") for host in hosts]
    saved = wait_for_save(folder / "runs" / "lost", 1, processes[0])
    assert saved, hosts[0].log(folder).read_text()
    hosts[1].lose_power()
    assert processes[0].wait(timeout=60) != 0
    printed = hosts[0].log(folder).read_text()
    assert "the connection to another process of this run is lost  (exit code 76)" in printed, printed[-8000:]
    assert result(folder / "runs" / "lost")["state"] == "failed"


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "launch_torchrun.sh"
    environment = shell_environment() | environment
    return subprocess.run([script, *words], capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    ("words", "environment", "culprit", "fix"),
    [
        (["strategy=ddp"], {}, "name= is missing", "strategy=ddp name=first"),
        (["name=pets"], {"NNODES": "2"}, "HEAD= is missing", "NNODES=2 HEAD="),
        (["name=pets", "trainer.num_nodes=3"], {}, "HEAD= is missing", "NNODES=3 HEAD="),
        (["name=pets"], {"NNODES": "two"}, "NNODES=two is not a number", "NNODES=2"),
        (["name=pets", "trainer.devices=[0,2]"], {}, "trainer.devices=[0,2] is not a", "CUDA_VISIBLE_DEVICES=0,2"),
        (["name=pets"], {"NNODES": "2", "HEAD": "a.invalid"}, "HEAD=a.invalid cannot be reached", "ping a.invalid"),
        (["name=pets", "optimizer.lrr=1"], {}, "optimizer.lrr is not a setting", "optimizer.lr=1"),
    ],
)
def test_wrong_use_is_answered_with_a_command(words, environment, culprit, fix):
    done = launch(*words, **environment)
    assert done.returncode == 64
    assert done.stderr.startswith(f"ERROR   {culprit}")
    assert fix in next(line for line in done.stderr.splitlines() if line.startswith("fix"))


def test_help_names_what_it_takes():
    done = launch("--help")
    assert done.returncode == 0
    for name in ("NNODES", "HEAD", "PORT", "IFNAME", "RESTARTS", "name="):
        assert name in done.stdout
