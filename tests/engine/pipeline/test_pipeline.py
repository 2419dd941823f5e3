"""strategy=pipeline with two real processes: the same as the unsplit network, fed the same micro-batches, to the bit."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from src.engine.runs.reading import read_checkpoint
from tests.conftest import command_environment
from tests.engine.pipeline.pipeline_ranks import BATCHES, SCENARIOS
from tests.tolerance import rounding

pytestmark = pytest.mark.slow

FILES = ("last.ckpt", "previous.ckpt", "network.pt")
FORWARD = rounding(layers=54)  # of a ResNet50
HALF = torch.finfo(torch.bfloat16).eps  # a unit in the last place of logits in half precision
FIRST = next(iter(SCENARIOS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes of pipeline_ranks.py left. One that waits for the other gives up after a minute."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    path = tmp_path_factory.mktemp("pipeline")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("pipeline_ranks.py")), str(path)]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes, logs = [], [path / "log0.txt", path / "log1.txt"]
    try:
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=command_environment() | together | own)
                )
        for process in processes:
            process.wait(timeout=500)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 1], "\n".join(log.read_text()[-4000:] for log in logs)
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """The places where two checkpoints are not the same, to the bit, to the order and to the memory layout."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if list(ours) != list(theirs):
            yield f"{path}: {list(ours)} {list(theirs)}"
        for key in ours.keys() & theirs.keys():
            yield from differences(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{path}/{index}")
    elif isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if not torch.equal(ours, theirs) or ours.stride() != theirs.stride():
            yield path
    elif ours != theirs:
        yield f"{path}: {ours} {theirs}"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_gives_the_loss_gradients_and_statistics_of_torchvisions_network(folder, name, schedule):
    first, second = (read(folder / f"batches{rank}.json")[f"{schedule}, {name}"] for rank in (0, 1))
    kind = "Schedule1F1B" if schedule == "1f1b" and name != "m=1" else "ScheduleGPipe"
    runs = 2 if name == "uneven parts" else 1
    for stage in (first, second):
        assert (stage["wrong"], stage["loss"], stage["others"]) == ([], True, [])
        assert stage["schedules"] == [kind] * runs
    assert [first["compared"], second["compared"]] == [[72, 72], [89, 87]], "of 161 weights and 159 buffers"


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_training_leaves_the_same_files(folder, name):
    """The weights, the optimizer's state, the scale of fp16 and all else, after each epoch; and the network in memory."""
    ours, theirs = folder / "pipeline" / name, folder / "alone" / name
    for file in FILES[:1] + FILES[1:2] * (SCENARIOS[name].epochs > 1) + FILES[2:]:
        assert list(differences(read_checkpoint(ours / file), read_checkpoint(theirs / file))) == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_processes_see_the_same_losses_and_metrics(folder, name):
    """In validation whole batches are as good as micro-batches, but not to the bit."""
    first, second = (read(folder / "pipeline" / name / f"rank{rank}.json") for rank in (0, 1))
    alone = read(folder / "alone" / name / "rank0.json")
    assert first == second
    assert first["losses"] == alone["losses"]
    assert len(set(first["losses"])) > 1
    for ours, theirs in zip(first["metrics"], alone["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=FORWARD if SCENARIOS[name].precision == "fp32" else HALF)


def test_a_checkpoint_of_one_device_is_continued(folder):
    """Nor is it a stale state of the other stage's optimizer that is saved in the end."""
    for file in ("last.ckpt", "network.pt"):
        ours, theirs = read_checkpoint(folder / "continued" / file), read_checkpoint(folder / "alone" / FIRST / file)
        assert list(differences(ours, theirs)) == []


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.precision == "fp16"])
def test_an_overflow_in_one_stage_skips_the_step_in_both(folder, name):
    scales = [read(folder / "pipeline" / name / f"rank{rank}.json")["scales"] for rank in (0, 1)]
    assert scales[0] == scales[1]
    assert scales[0] == [2.0, 2.0], "it is halved after the first step, which is skipped; the second is made"


def test_the_others_learn_of_an_error_in_one_process(folder):
    assert "Connection closed by peer" in (folder / "error0.txt").read_text()
    last = (folder / "log1.txt").read_text().strip().splitlines()[-1]
    assert last.endswith("ZeroDivisionError: only here"), "torch puts another error in its place"
