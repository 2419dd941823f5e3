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

from src.errors import UserError
from src.strategies.ranks import Ranks, is_loss_of_a_process


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
