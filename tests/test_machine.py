"""How many cores and threads a run takes: in a trial of a sweep, no more than the sweep gave it."""

from __future__ import annotations

import os

import pytest
import torch

from src.cores import TRIAL_CPUS, cpu_cores
from src.machine import set_threads


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
