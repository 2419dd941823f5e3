"""scripts/benchmarks/peers: its table, its images, and what it says of a peer that cannot run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.benchmarks.peers.contestants import PEERS, Run, find_python
from scripts.benchmarks.peers.drawing import draw_images
from scripts.benchmarks.peers.measuring import Cost, measure
from scripts.benchmarks.peers.programs.job import JOBS
from scripts.benchmarks.peers.table import Results
from tests.conftest import ROOT, command_environment


def test_the_table_has_medians_and_ratios_to_the_ideal():
    results = Results(["head"], ["ideal", "project", "fastai_learner", "hugging_face"])
    results.costs["head", "ideal"] = [Cost(seconds, 30, 1000) for seconds in (20, 10, 90)]
    results.costs["head", "project"] = [Cost(50, 60, peak) for peak in (1500, 1400, 2000)]
    results.accuracies |= {("head", "ideal"): [0.5, 0.5, 0.5], ("head", "project"): [0.25, 0.75, 0.5]}
    results.versions["project"] = "torch 2.10"
    results.reasons["fastai_learner"] = "skipped: no module | named fastai"
    results.failures["head", "hugging_face"] = "failed: exit code 1"
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in results.table().splitlines()]
    assert [len(row) for row in rows] == [8] * 6
    assert rows[2][2:7] == ["20", "1.00", "30", "1000", "0.500"]
    assert rows[3][2:7] == ["50", "2.50", "60", "1500", "0.500"]
    assert rows[3][7].startswith("torch 2.10; ")
    assert rows[4][2:] == [*"-----", "skipped: no module \\| named fastai"]
    assert rows[5][2:] == [*"-----", "failed: exit code 1"]


def test_a_peer_whose_library_is_missing_is_skipped_with_the_reason(monkeypatch):
    lacking = replace(PEERS["hugging_face"], libraries=("no_such_library",))
    monkeypatch.setitem(PEERS, "hugging_face", lacking)
    with pytest.raises(LookupError, match="No module named 'no_such_library'"):
        find_python("hugging_face", None, venvs=None)


def test_the_command_shows_the_reason_in_its_table(tmp_path):
    words = ["scripts/benchmarks/peers", "--peers", "fastai_learner", "--python", f"fastai_learner={tmp_path}/python"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=command_environment(), capture_output=True, text=True, timeout=60
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| head", "| full"))]
    assert len(rows) == 2, done.stderr
    assert all("skipped: [Errno 2] No such file or directory" in row for row in rows)


def test_two_calls_draw_the_same_images(tmp_path):
    drawn = []
    for name in ("first", "second"):
        draw_images(tmp_path / name, {"train": 9, "val": 2}, seed=0)
        files = sorted((tmp_path / name).rglob("*.jpg"))
        drawn.append({str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files})
    assert drawn[0] == drawn[1]
    assert len({*drawn[0].values()}) == 11, "all differ"
    assert sum(name.startswith("train/class0/") for name in drawn[0]) == 2


def test_every_peer_has_its_program():
    for peer in PEERS:
        program = Path(Run(peer, JOBS["head"], Path("data"), Path("weights"), Path("out")).command("python")[1])
        assert program.is_file() or peer == "project"


def test_the_memory_of_child_processes_counts_and_a_failure_is_told(tmp_path):
    child = "import time; block = bytearray(b'x' * 2**27); time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    cost = measure([sys.executable, "-c", parent], 1, tmp_path / "log.txt")
    assert cost.seconds > 1
    assert sys.platform != "linux" or cost.peak_mib > 128
    with pytest.raises(RuntimeError, match="exit code 1: ValueError: no such thing"):
        measure([sys.executable, "-c", "raise ValueError('no such thing')"], 1, tmp_path / "log.txt")
