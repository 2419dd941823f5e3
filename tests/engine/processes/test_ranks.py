"""What the processes of a run do together outside of a training step, with threads in the place of processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from src.engine.processes import ranks as module
from src.engine.processes.ranks import Ranks, is_loss_of_a_process
from src.engine.runs.errors import Terminated, UserError


@pytest.fixture
def together():
    """together(work): what work(ranks) gives, or raises, in each of three processes."""

    def run(work: Callable[[Ranks], Any]) -> list[Any]:
        store = dist.HashStore()
        store.set_timeout(timedelta(seconds=20))
        ranks = [Ranks(rank, 3, rank, 3, store) for rank in range(3)]
        with ThreadPoolExecutor(3) as threads:
            futures = [threads.submit(work, one) for one in ranks]
            return [future.exception() or future.result() for future in futures]

    return run


def test_the_first_does_the_work_and_tells_the_others(together):
    done: list[int] = []

    def work(ranks: Ranks) -> list[Any]:
        return [ranks.told_by_first(lambda: done.append(ranks.rank) or {"size": 16}), ranks.told_by_first(lambda: None)]

    assert together(work) == [[{"size": 16}, None]] * 3
    assert done == [0]


def test_the_others_begin_when_the_first_is_done(together):
    events: list[str] = []
    lock = threading.Lock()

    def slowly(rank: int) -> int:
        with lock:
            events.append(f"begin {rank}")
        time.sleep(0.2)
        with lock:
            events.append(f"end {rank}")
        return rank

    assert together(lambda ranks: ranks.after_first(lambda: slowly(ranks.rank))) == [0, 1, 2]
    assert events[:2] == ["begin 0", "end 0"]


def test_all_are_told_of_a_difference_between_any_two(together):
    values = [{"data": {"root": "photos"}, "lr": 0.1}, {"data": {"root": "photos"}, "lr": 0.1}]
    values.append({"data": {"root": "other"}, "lr": 0.1})
    errors = together(lambda ranks: ranks.check_same("settings", values[ranks.rank]))
    assert [type(error) for error in errors] == [UserError] * 3
    assert "data.root: photos in process 0, other in 2" in errors[0].why
    assert "data.root: other in process 2, photos in 0" in errors[2].why
    assert together(lambda ranks: ranks.check_same("settings", values[0])) == [None] * 3


def test_listing_may_take_longer_than_the_timeout_on_any_process(together):
    def work(ranks: Ranks) -> None:
        ranks.store.set_timeout(timedelta(seconds=0.2))
        time.sleep(0.7 * (ranks.rank == 1))
        ranks.check_same("images", {"images": 3})

    assert together(work) == [None] * 3


def test_who_is_missing_is_said(together):
    def work(ranks: Ranks) -> None:
        ranks.seconds = 3  # a loaded machine may keep a thread waiting for most of it
        if ranks.rank != 2:
            ranks.meet()

    assert [str(error) for error in together(work)] == ["process 2 is missing"] * 2 + ["None"]


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("None", None),
        ("Terminated", Terminated),
        ("KeyboardInterrupt", KeyboardInterrupt),
        ("UserError", dist.DistError),
    ],
)
def test_on_several_machines_the_others_wait_for_the_end_of_the_first(together, monkeypatch, how, kind):
    """torchrun ends a launch 300 seconds after the first of its machines has ended."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    ends: dict[int, float] = {}

    def work(ranks: Ranks) -> bool:
        ranks.local_world, ranks.seconds = 1, 4
        try:
            alone = ranks.leave()
            if ranks.is_first:
                time.sleep(6 if kind is None else 1)  # 6: longer than a silent process is waited for
            return alone
        finally:
            ends[ranks.rank] = time.monotonic()
            ranks.say_farewell(how if ranks.is_first else "None")

    first, *others = together(work)
    assert first is True
    assert [type(other) for other in others] == [kind] * 2 if kind in (Terminated, KeyboardInterrupt) else True
    assert all(other is False if kind is None else isinstance(other, kind) for other in others)
    assert min(ends[1], ends[2]) > ends[0]


def test_a_first_process_that_is_silent_is_given_up(together, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)

    def work(ranks: Ranks) -> Any:
        ranks.local_world, ranks.seconds = 1, 0.3
        if not ranks.is_first:  # the first was killed
            ranks.leave()

    first, *others = together(work)
    assert first is None
    assert all(isinstance(other, dist.DistError) for other in others)


def test_a_process_that_is_alone_asks_nobody():
    alone = Ranks()
    assert alone.told_by_first(lambda: 5) == alone.after_first(lambda: 5) == 5
    alone.check_same("settings", {"lr": 1})


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistNetworkError("timed out"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("Got the following error: RuntimeError: Application timeout caused pair closure"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_the_loss_of_a_process(error, lost):
    assert is_loss_of_a_process(error) is lost
