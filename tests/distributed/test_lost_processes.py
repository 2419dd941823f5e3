"""Real signals to the processes of strategy=ddp: each ends the job soon, says what happened, and loses nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from src.engine.runs.files import read_metrics, sha256
from src.engine.runs.reading import newest_position, read_checkpoint
from tests.conftest import SMALL
from tests.distributed.test_ddp import DDP
from tests.running import result, start, wait_for_save
from tests.tolerance import rounding

WORDS = (*SMALL, *DDP, "trainer.max_epochs=6", "checkpoint.every_n_steps=1", "data.num_workers=2")

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, *WORDS, "name=whole")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    return folder / "runs" / "whole"


def environment_of(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # ended meanwhile
        return {}
    return dict(pair.partition("=")[::2] for pair in pairs)


def processes_of(folder: Path) -> dict[int, str]:
    """{process: command line} of all that run in the folder, loader processes included."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                line = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                if " -m src." in line:  # a zombie has none, and pytest itself is in the folder too
                    found[int(entry.name)] = line
        except OSError:
            continue
    return found


def started(pid: int) -> int:
    """When, in ticks since the machine started; 0 for a process that has ended. Numbers of processes begin anew at times."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def ranks(folder: Path) -> dict[int, int]:
    """{rank: process}."""
    found: dict[int, int] = {}
    for pid, line in sorted(processes_of(folder).items(), key=lambda entry: started(entry[0]), reverse=True):
        # A loader process is a copy of its rank, and younger; that of a validation may have ended meanwhile.
        if "src.rank" in line and (rank := environment_of(pid).get("RANK")) is not None:
            found[int(rank)] = pid
    return found


def training(folder: Path, *words: str) -> subprocess.Popen:
    """A run of two processes that has saved a position in its second epoch."""
    process = start(folder, *WORDS, *words, "name=hurt")
    assert wait_for_save(folder / "runs" / "hurt", after_epoch=1, process=process), "it ended before"
    return process


def ends(process: subprocess.Popen, folder: Path, seconds: float) -> str:
    """What it printed; fails if it does not end in time or leaves processes behind."""
    out, err = process.communicate(timeout=seconds)
    deadline = time.monotonic() + 10  # a loader process looks every 5 seconds whether its trainer is alive
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left
    return out + err


def continues(command, folder: Path, undisturbed: Path) -> None:
    """The same command again ends as if nothing had happened."""
    assert newest_position(folder / "runs" / "hurt" / "checkpoints") is not None
    done = command("train", *WORDS, "name=hurt")
    assert done.code == 0, done.text
    assert "continuing from" in done.out
    hurt = folder / "runs" / "hurt"
    assert sha256(hurt / "model" / "model.safetensors") == sha256(undisturbed / "model" / "model.safetensors")
    assert result(hurt)["metrics"] == result(undisturbed)["metrics"]


def test_all_validate_with_the_statistics_that_are_saved(undisturbed):
    """BatchNorm learns here, in every process from other images; those of the first are in the checkpoint, with which it
    measures alone at the end."""
    best = result(undisturbed)["best_epoch"]
    row = next(row for row in read_metrics(undisturbed / "metrics.csv") if row["epoch"] == best)
    assert row["val/loss"] == pytest.approx(result(undisturbed)["metrics"]["val/loss"], rel=rounding(layers=57))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_and_the_run_continues(command, tmp_path, undisturbed, rank):
    process = training(tmp_path)
    os.kill(ranks(tmp_path)[rank], signal.SIGKILL)
    printed = ends(process, tmp_path, seconds=15)
    assert process.returncode == 76, printed
    assert f"process {rank} of the 2 processes was killed (SIGKILL)" in printed
    assert printed.count("ERROR") == 1, printed
    assert result(tmp_path / "runs" / "hurt")["state"] == "failed"
    if rank == 1:  # both are the same, and it takes long
        continues(command, tmp_path, undisturbed)


@pytest.mark.parametrize("to", ["the command", "rank 1"])
def test_sigterm_stops_all_at_the_same_step(command, tmp_path, undisturbed, to):
    process = training(tmp_path)
    os.kill(process.pid if to == "the command" else ranks(tmp_path)[1], signal.SIGTERM)
    printed = ends(process, tmp_path, seconds=30)
    assert process.returncode == 143, printed
    assert "Repeat the command" in printed
    hurt = tmp_path / "runs" / "hurt"
    logs = [(hurt / name).read_text() for name in ("train.log", "rank1.log")]
    steps = [re.findall(r"stopped at step (\d+)", text) for text in logs]
    assert len(steps[0]) == 1
    assert steps[0] == steps[1]
    assert read_checkpoint(hurt / "checkpoints" / "last.ckpt")["global_step"] == int(steps[0][0])
    assert result(hurt)["state"] == "interrupted"
    if to == "rank 1":
        continues(command, tmp_path, undisturbed)


def test_ctrl_c_reaches_the_processes_once(tmp_path):
    """In a terminal it is sent to all of the foreground; twice would mean: end at once, without a save."""
    process = training(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    printed = ends(process, tmp_path, seconds=30)
    assert process.returncode == 130, printed
    assert "stopped at step" in printed


def test_a_process_that_hangs_is_named(tmp_path):
    process = training(tmp_path, "strategy.timeout_seconds=4", "data.num_workers=0")
    os.kill(ranks(tmp_path)[1], signal.SIGSTOP)
    printed = ends(process, tmp_path, seconds=25)
    assert process.returncode == 76, printed
    assert "process 1 of the 2 processes no longer answered" in printed


def test_the_processes_end_with_the_command(tmp_path):
    """Whatever ends it: nobody else would tell them."""
    process = training(tmp_path)
    process.send_signal(signal.SIGKILL)
    ends(process, tmp_path, seconds=15)


def test_processes_with_different_settings_do_not_train(tmp_path):
    """As torchrun would start them on two machines with different command lines."""
    words = (*SMALL, "strategy=ddp", "trainer.accelerator=cpu", "name=odd", "strategy.timeout_seconds=20")
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    both = [
        start(tmp_path, *words, "trainer.num_nodes=2", f"optimizer.lr={rate}", **common, RANK=str(rank))
        for rank, rate in enumerate((0.001, 0.002))
    ]
    for rank, process in enumerate(both):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 64, out + err
        assert "different settings" in err
        assert f"optimizer.lr: {(0.001, 0.002)[rank]} in process {rank}" in err
    assert not (tmp_path / "runs" / "odd" / "metrics.csv").exists()
