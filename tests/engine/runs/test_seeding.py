"""Randomness without state: the same numbers in every process, and nothing of the global generators is touched."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import torch

from src.engine.runs import seeding
from tests.conftest import command_environment


def test_keys_are_the_same_in_every_process():
    code = "from src.engine.runs import seeding; print(seeding.key(1, 'order', 2), seeding.epoch_order(3, 4, 5))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=command_environment() | {"PYTHONHASHSEED": str(salt)},
        ).stdout
        for salt in (1, 2)
    }
    assert printed == {f"{seeding.key(1, 'order', 2)} {seeding.epoch_order(3, 4, 5)}\n"}


def test_every_epoch_has_an_order_of_its_own():
    orders = [seeding.epoch_order(0, epoch, 50) for epoch in range(5)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert orders[2] == seeding.epoch_order(0, 2, 50)


def draw():
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def test_a_images_randomness_is_a_function_of_seed_epoch_and_index():
    seeding.seed_everything(1)
    before = draw()
    seeding.seed_everything(1)
    with seeding.image_randomness(0, 3, 7):
        inside = draw()
    assert draw() == before, "the global generators moved"
    with seeding.image_randomness(0, 3, 7):
        assert draw() == inside
    for other in ((1, 3, 7), (0, 4, 7), (0, 3, 8)):
        with seeding.image_randomness(*other):
            assert not set(draw()) & set(inside)


def test_a_steps_randomness_differs_by_step_and_rank():
    draws = set()
    for step in range(3):
        for rank in range(2):
            seeding.seed_step(0, step, rank)
            draws.add(draw())
    assert len(draws) == 6


def test_a_step_notes_down_no_stack(monkeypatch):
    """As torch.manual_seed does for every kind of device that is not in use, at each call."""

    def refuse(*_):
        raise AssertionError("the stack was formatted")

    monkeypatch.setattr("traceback.format_stack", refuse)
    seeding.seed_step(0, 1, 0)
    first = torch.rand(3)
    seeding.seed_step(0, 1, 0)
    assert torch.rand(3).equal(first)
