"""Two real processes, one of which runs out of memory: neither waits for ever, and both end as if there had been enough."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from src.engine.runs.errors import ExitCode
from tests.conftest import command_environment
from tests.distributed.out_of_memory_ddp import SCENARIOS
from tests.tolerance import DOUBLE

BATCHES = 8  # of two epochs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What out_of_memory_ddp.py found in each of the two processes. One that hangs gives up after 20 seconds."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    path = tmp_path_factory.mktemp("ddp") / "found.json"
    together = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *together, str(Path(__file__).with_name("out_of_memory_ddp.py")), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=command_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.numbers
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_ranks_stay_one_model_and_end_as_if_all_had_fitted(found, name):
    settings = SCENARIOS[name][3]
    first, second = (of_rank[name] for of_rank in found)
    assert first["weights"] == second["weights"]
    assert first["steps"] == second["steps"] == BATCHES
    if "batchnorm" not in settings:
        expected = found[0]["fits"]["weights"]
        assert first["weights"] == pytest.approx(expected, abs=DOUBLE)


def test_the_callback_changes_nothing_where_all_fits(found):
    assert found[0]["fits"]["weights"] == found[0]["without the callback"]["weights"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_whole_batches_go_the_way_of_ddp(found, name):
    failing, _, batches, settings = SCENARIOS[name]
    before = ["DDP"] * (batches.start if failing else BATCHES)
    in_parts = ["parts"] * (BATCHES - len(before))
    if "grow_after" in settings:  # of 4 images, two steps later of 8, again two later whole batches
        in_parts = ["parts"] * 4 + ["DDP"] * BATCHES
    for of_rank in found:
        assert of_rank[name]["ways"] == (before + in_parts)[:BATCHES]


def test_the_wrapper_and_its_buckets_do_not_take_memory_while_batches_are_in_parts(found):
    """Nor do its hooks send anything, even if something else still refers to it ("later backward")."""
    assert [of_rank["first backward, rank 1"]["left over"] for of_rank in found] == [0, 0]
    assert [of_rank["later backward, rank 1"]["left over"] for of_rank in found] == [1, 1]


def test_all_ranks_make_the_same_attempts(found):
    """Also the one that did not fail; the last batch of an epoch is smaller by one image on rank 1."""
    ours, theirs = (
        [pair for pair in of_rank["first forward, rank 1"]["attempts"] if pair[0] == 0] for of_rank in found
    )
    assert theirs == [[0, 16], [0, 8], [0, 4], [0, 4], [0, 4], [0, 4]]
    assert ours == [[0, 16], [0, 8], [0, 8], [0, 4], [0, 4], [0, 4], [0, 4]]


def test_both_stop_when_a_image_does_not_fit_in_one(found):
    assert [of_rank["one image"]["code"] for of_rank in found] == [ExitCode.OUT_OF_MEMORY] * 2
    assert "another process" in found[0]["one image"]["text"]
