"""A change of phase under DistributedDataParallel, with two real processes: the ranks stay one model, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks.test_backbone_finetuning_defects import MENDED
from tests.conftest import command_environment


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What freezing_ddp.py saw: of "stock" (unfreezes in epoch 1) and "ours" (in epochs 1 and 2), a dict per epoch."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    found = tmp_path_factory.mktemp("ddp") / "seen.json"
    together = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *together, str(Path(__file__).with_name("freezing_ddp.py")), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=command_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(found.read_text())


def same(epoch: dict) -> bool:
    first, second = epoch["hashes"]
    return first == second


def test_the_ranks_keep_the_same_weights_in_every_phase(seen):
    assert [same(epoch) for epoch in seen["ours"]] == [True] * 4
    assert len({epoch["hashes"][0] for epoch in seen["ours"]}) == 4, "nothing was trained"


def test_the_wrapper_of_the_phase_before_is_gone(seen):
    """It would average the gradients a second time."""
    assert [epoch["wrappers"] for epoch in seen["ours"]] == [1] * 4


def test_defect_6_what_is_unfrozen_later_is_not_synchronised(seen):
    assert same(seen["stock"][0]), "the ranks differ before anything was unfrozen: the test itself is wrong"
    assert not any(same(epoch) for epoch in seen["stock"][1:]), MENDED
    assert all(same(epoch) for epoch in seen["ours"])
