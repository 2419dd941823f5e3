"""Checkpoints on the disk: written whole, in the background, the one before kept; checked before they are read."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time

import pytest
import torch

from src.engine.runs import writing
from src.engine.runs.checksum import damage, save_with_checksum
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.reading import newest_position, read_checkpoint
from src.engine.runs.writing import DurableCheckpointIO


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
    assert len(slow_disk.written) <= 5
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


class Disk:
    """A disk that is slow, and full now and then. After each of its operations, which is where a kill may strike, the
    positions on it must refer to files that are on it."""

    def __init__(self, folder, monkeypatch, rng, full):
        self.folder, self.rng, self.full, self.looks = folder, rng, full, 0
        self.positions = ["last.ckpt", "previous.ckpt"]
        write, remove = writing.write_atomically, writing._remove
        monkeypatch.setattr(writing, "save_with_checksum", lambda value, file: file.write(json.dumps(value).encode()))
        monkeypatch.setattr(writing, "write_atomically", lambda *a, **k: self.work(write, *a, **k))
        monkeypatch.setattr(writing, "_remove", lambda paths: self.work(remove, paths))
        monkeypatch.setattr("src.engine.runs.files.os.fsync", lambda handle: None)

    def work(self, do, *arguments, **keywords):
        time.sleep(self.rng.choice([0, 0, 0.0005, 0.002]))
        if do.__name__ == "write_atomically" and self.rng.random() < self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        do(*arguments, **keywords)
        self.look()

    def read(self, name):
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def look(self):
        self.looks += 1
        for name in self.positions:
            if (position := self.read(name)) is not None and position["kept"]:
                assert self.read("best.ckpt")["epoch"] >= position["kept"][0], (name, position)
                for epoch in position["kept"]:
                    assert self.read(f"epoch-{epoch}.ckpt") == {"epoch": epoch}, (name, position)


@pytest.mark.parametrize("full", [0.0, 0.3], ids=["slow", "full now and then"])
def test_no_position_on_the_disk_refers_to_a_file_that_is_not_there(tmp_path, monkeypatch, full):
    """Random trainings that keep the best two epochs, on a disk of random speed."""
    for seed in range(25):
        rng, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        with monkeypatch.context() as patch:
            disk, io, kept, step = Disk(folder, patch, random.Random(-seed), full), DurableCheckpointIO(), [], 0
            for epoch in range(12):
                for _ in range(rng.randrange(4)):
                    step += 1
                    io.save_checkpoint({"step": step, "kept": [one for _, one in kept]}, folder / "last.ckpt")
                    time.sleep(rng.choice([0, 0, 0.001]))
                score = (rng.random(), epoch)
                kept, dropped = sorted([*kept, score], reverse=True)[:2], sorted([*kept, score], reverse=True)[2:]
                if kept[0] == score:
                    io.save_checkpoint({"epoch": epoch}, folder / "best.ckpt")
                if score in kept:
                    io.save_checkpoint({"epoch": epoch}, folder / f"epoch-{epoch}.ckpt")
                for _, worst in dropped:
                    if worst != epoch:
                        io.remove_checkpoint(folder / f"epoch-{worst}.ckpt")
                step += 1
                io.save_checkpoint({"step": step, "kept": [one for _, one in kept]}, folder / "last.ckpt")
            io.wait()
            disk.full = 0.0
            if full:
                io.save_checkpoint({"step": step, "kept": [one for _, one in kept]}, folder / "last.ckpt")
                io.wait()
            disk.positions.pop()  # after the end the files of the last position are left
            io.teardown()
            assert disk.read("last.ckpt")["step"] == step, "the newest position is not on the disk"
            names = {"last.ckpt", "previous.ckpt", "best.ckpt", *(f"epoch-{epoch}.ckpt" for _, epoch in kept)}
            assert {path.name for path in folder.iterdir()} == names
            assert disk.looks > 5


def test_a_disk_slower_than_the_training_does_not_keep_positions_waiting(tmp_path, monkeypatch):
    """Between any two writes of the disk a new best epoch, its own file and a position are saved."""
    written, turn = [], threading.Semaphore(0)
    monkeypatch.setattr(writing, "_write", lambda path, checkpoint: turn.acquire() and not written.append(path.name))
    io = DurableCheckpointIO()
    for epoch in range(60):
        for name in ("best.ckpt", f"epoch-{epoch}.ckpt", "last.ckpt"):
            io.save_checkpoint({}, tmp_path / name)
        if epoch >= 3:
            io.remove_checkpoint(tmp_path / f"epoch-{epoch - 3}.ckpt")
        turn.release()
    for _ in range(10):
        turn.release()
    io.teardown()
    places = [place for place, name in enumerate(written) if name == "last.ckpt"]
    # At most the best, five epochs and the position: a round may begin between an epoch's file and its position.
    assert max(after - before for before, after in zip([0, *places], places, strict=False)) <= 7, written


def test_positions_do_not_go_without_the_files_that_the_disk_did_not_take(tmp_path):
    """A real limit on the size of a file: the best weights are too large, the position is not."""
    resource = pytest.importorskip("resource")
    io, before = DurableCheckpointIO(), resource.getrlimit(resource.RLIMIT_FSIZE)
    io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    io.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        io.save_checkpoint({"w": torch.zeros(10**6)}, tmp_path / "best.ckpt")
        io.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
        io.wait()
        assert io.unwritten == {tmp_path / "best.ckpt", tmp_path / "last.ckpt"}
        assert read_checkpoint(tmp_path / "last.ckpt") == {"step": 1}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    io.save_checkpoint({"step": 3}, tmp_path / "last.ckpt")  # there is room again
    io.teardown()
    assert read_checkpoint(tmp_path / "best.ckpt")["w"].numel() == 10**6
    assert read_checkpoint(tmp_path / "last.ckpt") == {"step": 3}


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
    assert io.unwritten == {path}
    assert read_checkpoint(path)["w"].numel() == 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    io.save_checkpoint({"w": torch.zeros(20)}, path)
    io.teardown()
    assert not io.unwritten
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
            "epoch_loop.manual_optimization.optim_step_progress": {"total": COUNT},
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


def test_a_position_that_is_gone_is_no_start_from_nothing(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    write(POSITION | {"epoch": 0}, folder / "best.ckpt")  # the first epoch's, before the first position: a kill there
    assert newest_position(folder) is None
    assert not caplog.text
    (tmp_path / "metrics.csv").write_text("epoch,step\n1,3\n")
    assert newest_position(folder) is None
    assert "it begins again" in caplog.text
    write(POSITION | {"epoch": 4}, folder / "best.ckpt")
    with pytest.raises(UserError, match="the position of this run is gone") as caught:
        newest_position(folder)
    assert caught.value.code == ExitCode.DAMAGED
    assert "best.ckpt has the weights of epoch 5" in caught.value.why
    write(POSITION, folder / "previous.ckpt")  # the negative control
    assert newest_position(folder) == folder / "previous.ckpt"


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"state_dict": Payload()}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="Weights only"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()
