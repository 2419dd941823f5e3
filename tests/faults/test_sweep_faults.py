"""Real kills and signals to a sweep with Ray Tune: it goes on where it was, and says the truth in its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from src.engine.runs.files import read_metrics, sha256
from src.engine.sweeps.sweep_journal import FINISHED, PAUSED, Journal
from tests.conftest import SMALL
from tests.running import result, start

WORDS = ("-m", "hydra/launcher=ray_tune", *SMALL, "trainer.max_epochs=8", "optimizer.lr=0.001,0.01", "name=hit")

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")


def rows(folder: Path) -> int:
    """How many epochs the trials of the sweep have reported."""
    journal = folder / "runs/hit/trials.jsonl"
    return journal.read_text().count('"event": "row"') if journal.exists() else 0


def wait_for(folder: Path, count: int, sweep: subprocess.Popen) -> None:
    while rows(folder) < count:
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.05)


def workers(sweep: subprocess.Popen) -> list[int]:
    """The processes in which trials of this sweep run: those of its own Ray."""
    status = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
                name = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            status[int(entry.name)] = int(text.rpartition(")")[2].split()[1]), name

    def ancestors(pid: int) -> set[int]:
        found = set()
        while pid in status:
            found.add(pid)
            pid = status[pid][0]
        return found

    return [pid for pid, (_, name) in status.items() if "Trainable" in name and sweep.pid in ancestors(pid)]


def check_whole(folder: Path, undisturbed: Path) -> None:
    """Both trials have every epoch once, and the first the numbers that nobody disturbed."""
    trials = Journal(folder / "runs/hit").trials
    assert {number: trial.state for number, trial in trials.items()} == {0: FINISHED, 1: FINISHED}
    for number in (0, 1):
        seen = read_metrics(folder / f"runs/hit/{number}/metrics.csv")
        assert [row["epoch"] for row in seen] == list(range(1, 9))
        assert sorted(trials[number].rows) == list(range(1, 9))
    learnt = read_metrics(folder / "runs/hit/0/metrics.csv")
    expected = read_metrics(undisturbed / "metrics.csv")
    for name in ("val/loss", "val/acc"):  # train/loss of an epoch that was taken up is that of its rest
        assert [row[name] for row in learnt] == [row[name] for row in expected]
    weights = Path("model/model.safetensors")
    assert sha256(folder / "runs/hit/0" / weights) == sha256(undisturbed / weights)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of trial 0 as a run of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = start(folder, *SMALL, "trainer.max_epochs=8", "optimizer.lr=0.001", "name=whole")
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, out + err
    return folder / "runs/whole"


def test_a_killed_worker_and_a_killed_driver(tmp_path, undisturbed):
    """kill -9 of a worker: another goes on with its trial. kill -9 of the command: the same command goes on with all."""
    sweep = start(tmp_path, *WORDS)
    wait_for(tmp_path, 4, sweep)
    os.kill(workers(sweep)[0], signal.SIGKILL)
    wait_for(tmp_path, 9, sweep)
    sweep.kill()
    out, err = sweep.communicate(timeout=60)
    assert "its process ended (it was killed, or crashed); it goes on in a new one" in out + err

    again = start(tmp_path, *WORDS)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, out + err
    check_whole(tmp_path, undisturbed)
    assert any("continuing from" in log.read_text() for log in (tmp_path / "runs/hit").glob("[01]/train.log"))


def marked(mark: str) -> list[str]:
    """The command lines of all processes that have the mark in their environment; those that have ended have none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if f"MARK={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if line]


def test_a_killed_driver_leaves_no_process(tmp_path):
    """kill -9 of the command: Ray, the worker, the ranks of its trial and their loaders see it and end.

    Two helpers of Ray, its agents, try for another minute to tell somebody of it.
    """
    mark = str(tmp_path)
    words = (
        "trainer.accelerator=cpu",
        "strategy=ddp",
        "trainer.devices=2",
        "data.num_workers=1",
        "trainer.max_epochs=99",
        "feature_bank.views=0",  # with which no loader process lives for long
    )
    sweep = start(tmp_path, *WORDS, *words, MARK=mark)
    try:
        wait_for(tmp_path, 1, sweep)
        before = marked(mark)
        for part in ("raylet", "gcs_server", "Trainable", "src.rank", "src.train"):
            assert any(part in line for line in before), before
        assert sum("src.rank" in line for line in before) > 2, "two ranks, and loaders"
    finally:
        sweep.kill()
    sweep.communicate(timeout=60)
    deadline = time.monotonic() + 15
    while left := [line for line in marked(mark) if "Agent" not in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_ctrl_c_and_on(tmp_path, undisturbed):
    """As a terminal sends it, to all processes at once."""
    sweep = start(tmp_path, *WORDS)
    wait_for(tmp_path, 4, sweep)
    os.killpg(sweep.pid, signal.SIGINT)
    out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, out + err
    trials = Journal(tmp_path / "runs/hit").trials
    assert PAUSED in [trial.state for trial in trials.values()]
    states = [result(tmp_path / f"runs/hit/{number}")["state"] for number in trials]
    assert "interrupted" in states
    assert not (tmp_path / "runs/hit/0/model").exists()

    again = start(tmp_path, *WORDS)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, out + err
    check_whole(tmp_path, undisturbed)


def test_ctrl_c_twice_ends_at_once(tmp_path):
    sweep = start(tmp_path, *WORDS, "hydra.launcher.max_concurrent=1")
    wait_for(tmp_path, 1, sweep)
    left = workers(sweep)
    sweep.send_signal(signal.SIGINT)
    time.sleep(0.3)
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, out + err
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left):
        assert time.monotonic() < deadline, "its workers are still there"
        time.sleep(0.2)


def test_a_process_of_ddp_that_dies_ends_no_trial(tmp_path):
    """kill -9 of a rank: its trial goes on from its checkpoint, with new processes."""
    words = ("trainer.accelerator=cpu", "strategy=ddp", "trainer.devices=2", "optimizer.lr=0.001", "seed=0,1")
    sweep = start(tmp_path, *WORDS, *words, "trainer.max_epochs=4")
    wait_for(tmp_path, 2, sweep)
    ranks = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _is_rank(entry, tmp_path)]
    os.kill(ranks[-1], signal.SIGKILL)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out + err
    assert "it goes on in a new one" in out + err
    trials = Journal(tmp_path / "runs/hit").trials
    assert all(sorted(trial.rows) == [1, 2, 3, 4] for trial in trials.values()), json.dumps(
        {number: sorted(trial.rows) for number, trial in trials.items()}
    )


def _is_rank(entry: Path, folder: Path) -> bool:
    try:
        return (entry / "cwd").readlink() == folder and b"src.rank" in (entry / "cmdline").read_bytes()
    except OSError:
        return False
