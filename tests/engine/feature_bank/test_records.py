"""Features on the disk survive what happens to files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from src.engine.feature_bank.records import GIB, Records, trim
from tests.conftest import command_environment

NAMES = [f"digest{number}" for number in range(6)]
ROWS = torch.arange(24, dtype=torch.float32).view(6, 4) / 7


@pytest.fixture
def records(tmp_path) -> Records:
    records = Records(tmp_path / "kind")
    records.add(NAMES[:4], ROWS[:4])
    records.add(NAMES[4:], ROWS[4:])
    return records


def found(records: Records, names: list[str] = NAMES) -> dict[str, list[float]]:
    places, rows = records.load(names)
    return {names[place]: row.tolist() for place, row in zip(places, [] if rows is None else rows, strict=True)}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_to_the_bit_by_their_names(tmp_path, kind):
    records = Records(tmp_path / "kind")
    records.add(NAMES, ROWS.to(kind))
    places, rows = records.load(["unknown", NAMES[5], NAMES[1]])
    assert sorted(places) == [1, 2]
    assert rows.dtype == kind
    assert rows[places.index(1)].equal(ROWS[5].to(kind))
    assert rows[places.index(2)].equal(ROWS[1].to(kind))


def test_copies_of_an_image_share_a_row(records):
    places, rows = records.load(["unknown", NAMES[2], NAMES[5], NAMES[2]])
    assert sorted(places) == [1, 2, 3]
    assert rows[places.index(1)].equal(rows[places.index(3)])


def test_files_of_several_writers_are_one_store(records):
    other = Records(records.folder)
    threads = [threading.Thread(target=writer.add, args=(NAMES, ROWS)) for writer in (records, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found(records) == dict(zip(NAMES, ROWS.tolist(), strict=True))


def test_a_flipped_bit_anywhere_is_noticed(records, caplog):
    """In the numbers, the names or the head of a file: what is left is right, and can be computed again."""
    path = max(records.folder.iterdir(), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        rows = found(records)
        assert {name: ROWS[NAMES.index(name)].tolist() for name in rows} == rows, position
    path.write_bytes(content)
    assert len(found(records)) == 6


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_computed_again(records, share):
    path = max(records.folder.iterdir(), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert set(found(records)) in ({*NAMES[:4]}, {*NAMES[4:]})
    records.add(NAMES, ROWS)
    assert len(found(records)) == 6


def test_a_full_disk_is_said_once_and_no_reason_to_stop(tmp_path):
    code = f"""
import resource, torch
from src.engine.feature_bank.records import Records
from src.engine.runs import logs
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
import logging; logging.basicConfig(level="WARNING")
records = Records(Path({str(tmp_path / "kind")!r}))
for _ in range(3):
    records.add(["a", "b"], torch.zeros(2, 1000))
"""
    done = subprocess.run([sys.executable, "-c", code], env=command_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Features cannot be kept") == 1
    assert list((tmp_path / "kind").iterdir()) == []


def test_a_killed_writer_leaves_no_file_that_counts(records):
    """What it had begun is removed by the next run, unless its process still writes."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = records.folder / f"features-0123456789ab.safetensors.{dead.pid}.tmp"
    under_way = records.folder / f"features-0123456789ab.safetensors.{os.getpid()}.tmp"
    foreign = records.folder / "notes.tmp"
    for path in (leftover, under_way, foreign):
        path.write_bytes(b"half a file")
    trim(records.folder.parent, 1)
    assert not leftover.exists()
    assert under_way.exists()
    assert foreign.exists()
    assert len(found(records)) == 6


def test_what_was_used_longest_ago_goes_first(tmp_path):
    for number, name in enumerate(("old", "older", "new")):
        Records(tmp_path / name).add(NAMES, ROWS)
        os.utime(tmp_path / name, (number, number))
    Records(tmp_path / "old").load(NAMES)  # used again
    size = sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    trim(tmp_path, 2.5 * size / GIB)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    trim(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
