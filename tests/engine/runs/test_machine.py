"""How many cores and threads a run takes: in a trial of a sweep, no more than the sweep gave it."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from src.engine.runs.cores import TRIAL_CPUS, cpu_cores
from src.engine.runs.machine import begin_peak, peak_memory_mib, set_threads


@pytest.fixture
def chosen(monkeypatch):
    """What torch is told."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return chosen


@pytest.mark.parametrize(("given", "cores"), [("3.0", 3), ("1", 1), ("0.5", 1), ("2.9", 2)])
def test_a_trial_has_the_cores_that_it_was_given(monkeypatch, given, cores):
    assert TRIAL_CPUS not in os.environ
    outside = cpu_cores()
    assert outside >= 1
    monkeypatch.setenv(TRIAL_CPUS, given)
    assert cpu_cores() == cores
    monkeypatch.delenv(TRIAL_CPUS)
    assert cpu_cores() == outside


@pytest.mark.parametrize(("sharers", "threads"), [(1, 6), (2, 3), (8, 1)])
def test_the_threads_of_a_trial_are_its_cores(monkeypatch, chosen, sharers, threads):
    monkeypatch.setenv(TRIAL_CPUS, "6.0")
    set_threads(None, sharers)
    assert chosen == [threads]


def test_what_was_asked_for_wins(monkeypatch, chosen):
    monkeypatch.setenv(TRIAL_CPUS, "6.0")
    set_threads(4)
    assert chosen == [4]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    set_threads(None)
    assert chosen == [4], "torch has read OMP_NUM_THREADS by itself"


def test_a_run_that_is_no_trial_leaves_it_to_torch(chosen):
    set_threads(None)
    assert not chosen


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset")
def test_the_peak_of_a_run_is_not_that_of_the_one_before():
    """A sweep has one process for many runs: a large one, then a small one."""
    device = torch.device("cpu")
    assert begin_peak(device)
    before = peak_memory_mib(device)
    torch.ones(300 * 2**20 // 4)
    assert peak_memory_mib(device) - before > 250
    assert begin_peak(device)
    assert peak_memory_mib(device) - before < 50


def test_a_peak_that_is_not_the_own_is_not_told(monkeypatch):
    def refuse():
        raise PermissionError

    monkeypatch.setattr("src.engine.memory.ram.reset_resident_peak", refuse)
    assert not begin_peak(torch.device("cpu"))
