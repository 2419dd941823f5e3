"""Checkpoints on the disk: written whole, in the background, the one before kept; checked before they are read."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from src.checkpoints import writing
from src.checkpoints.checksum import damage, save_with_checksum
from src.checkpoints.reading import newest_position, read_checkpoint
from src.checkpoints.writing import DurableCheckpointIO
from src.errors import ExitCode, UserError
from tests.conftest import command_environment


@pytest.fixture
def slow_disk(monkeypatch):
    """The thread's writes wait for .set(); what is written is noted."""
    go, original = threading.Event(), writing.write_atomically
    go.written = []

    def write(path, *arguments, **keywords):
        assert go.wait(30)
        go.written.append(path.name)
        original(path, *arguments, **keywords)

    monkeypatch.setattr(writing, "write_atomically", write)
    return go


def test_the_copy_is_of_the_moment_and_nothing_waits_for_the_disk(tmp_path, slow_disk):
    weights = {"w": torch.zeros(3), "steps": [1, {"deep": torch.zeros(1)}]}
    io = DurableCheckpointIO()
    io.save_checkpoint(weights, tmp_path / "last.ckpt")  # returns, though the disk does not move
    weights["w"] += 1
    weights["steps"][1]["deep"] += 1
    weights["steps"].append(2)
    slow_disk.set()
    io.teardown()
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert saved["w"].tolist() == [0, 0, 0]
    assert saved["steps"] == [1, {"deep": torch.zeros(1)}]


def test_without_background_the_file_is_there_at_once(tmp_path):
    DurableCheckpointIO(background=False).save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == {"step": 1}


def test_a_copy_that_waits_is_replaced_by_a_newer_one(tmp_path, slow_disk):
    """A disk slower than the saves must not pile up copies; what is written last is the newest."""
    io = DurableCheckpointIO()
    for step in range(5):
        io.save_checkpoint({"step": step}, tmp_path / "last.ckpt")
        io.save_checkpoint({"step": -step}, tmp_path / "best.ckpt")
    assert len(io._waiting) <= 2
    slow_disk.set()
    io.teardown()
    assert len(slow_disk.written) < 5
    assert read_checkpoint(tmp_path / "last.ckpt") == {"step": 4}
    assert read_checkpoint(tmp_path / "best.ckpt") == {"step": -4}


@pytest.mark.parametrize("background", [True, False])
def test_the_last_but_one_position_is_kept(tmp_path, background):
    for step in range(3):
        io = DurableCheckpointIO(background)
        io.save_checkpoint({"step": step}, tmp_path / "last.ckpt")
        io.save_checkpoint({"step": step}, tmp_path / "best.ckpt")
        io.teardown()
    assert read_checkpoint(tmp_path / "last.ckpt") == {"step": 2}
    assert read_checkpoint(tmp_path / "previous.ckpt") == {"step": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}


def test_removing_comes_after_the_writes_before_it(tmp_path, slow_disk):
    io = DurableCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "epoch-0001.ckpt")
    io.remove_checkpoint(tmp_path / "epoch-0001.ckpt")
    io.remove_checkpoint(tmp_path / "never-there.ckpt")
    slow_disk.set()
    io.teardown()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_takes_no_more_keeps_the_old_file_and_training(tmp_path, caplog, background):
    """A real limit of the system on the size of a file: as with a full disk, write() fails half-way."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.ckpt"
    io = DurableCheckpointIO(background)
    io.save_checkpoint({"w": torch.zeros(10)}, path)
    io.teardown()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        io.save_checkpoint({"w": torch.zeros(10**6)}, path)
        io.teardown()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "last.ckpt could not be written: File too large" in caplog.text
    assert "df -h" in caplog.text
    assert io.failed == {path}
    assert read_checkpoint(path)["w"].numel() == 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    io.save_checkpoint({"w": torch.zeros(20)}, path)
    io.teardown()
    assert not io.failed
    assert read_checkpoint(path)["w"].numel() == 20


def test_a_mistake_of_the_program_is_not_taken_for_a_full_disk(tmp_path):
    io = DurableCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    io.save_checkpoint({"step": lambda: 2}, tmp_path / "best.ckpt")
    with pytest.raises(Exception, match=r"pickle|local object"):
        io.teardown()
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_every_damage_is_found(tmp_path):
    """A byte turned over anywhere, or a file cut anywhere; torch itself reads most of them as other numbers."""
    whole, broken = tmp_path / "whole.ckpt", tmp_path / "broken.ckpt"
    with whole.open("wb") as file:
        save_with_checksum({"w": torch.arange(300.0), "epoch": 3}, file)
    assert damage(whole) is None
    assert read_checkpoint(whole)["w"].equal(torch.arange(300.0))
    assert torch.load(whole, weights_only=True, mmap=True)["epoch"] == 3
    content = whole.read_bytes()
    for place in range(len(content)):
        broken.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        assert damage(broken), place
    for length in (0, 1, 20, len(content) // 2, len(content) - 1):
        broken.write_bytes(content[:length])
        assert damage(broken), length
    assert damage(tmp_path / "nowhere.ckpt")


def write(checkpoint, path):
    DurableCheckpointIO(background=False).save_checkpoint(checkpoint, path)


# The least that a run can go on from.
COUNT = {"ready": 1, "started": 1, "processed": 1, "completed": 1}
POSITION = {
    **{"epoch": 0, "global_step": 1, "state_dict": {"network.w": torch.ones(2)}, "callbacks": {}},
    **{"optimizer_states": [{}], "lr_schedulers": [{}]},
    "loops": {
        "fit_loop": {
            "epoch_progress": {"current": COUNT},
            "epoch_loop.batch_progress": {"total": COUNT},
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": {"total": COUNT}}},
        }
    },
}


def test_the_newest_whole_position(tmp_path, caplog):
    assert newest_position(tmp_path) is None
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    write(POSITION, previous)  # as after a crash between the two renames
    assert newest_position(tmp_path) == previous
    write(POSITION, last)
    assert newest_position(tmp_path) == last
    assert not caplog.text
    last.write_bytes(last.read_bytes()[:-10])
    assert newest_position(tmp_path) == previous
    assert "last.ckpt is damaged" in caplog.text
    previous.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        newest_position(tmp_path)
    assert caught.value.code == ExitCode.DAMAGED
    assert "last.ckpt" in caught.value.render()
    assert "previous.ckpt" in caught.value.render()


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"state_dict": Payload()}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="Weights only"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_kill_in_the_middle_of_writing_leaves_the_old_checkpoint(tmp_path):
    """Killed while it writes, with the temp folder on another file system where there is one: the old file is whole."""
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO(background=False).save_checkpoint({"step": 1}, path)
    code = (
        "import os, signal, torch\n"
        "from src.checkpoints.writing import DurableCheckpointIO\n"
        "class Kill:\n"
        "    def __reduce__(self):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"DurableCheckpointIO(background=False).save_checkpoint({{'w': torch.zeros(10**6), 'kill': Kill()}}, {str(path)!r})\n"
    )
    environment = command_environment() | {"TMPDIR": "/dev/shm" if Path("/dev/shm").is_dir() else str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    assert list(tmp_path.glob("*.tmp")), "it was not killed while it wrote"
    assert read_checkpoint(path) == {"step": 1}
