"""The sizes that data.batch_size=auto tries, on made-up devices, and what it prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

from src.engine.batch_size.batch_size_search import (
    HEADER,
    Measured,
    chosen_batch_size,
    largest_fitting,
    search,
    smallest_as_fast,
)
from src.engine.runs.errors import ExitCode, UserError


def line(ran: list[int], fixed: int = 500, each: int = 10):
    """A device on which a step takes fixed + each * size MiB, and notes the sizes that ran."""

    def measure(size: int) -> Measured:
        ran.append(size)
        return Measured(fixed, fixed + each * size, 100.0)

    return measure


def below(limit: int):
    """A device that runs out of memory above `limit` images."""
    return lambda size: Measured(1, size, 100.0) if size <= limit else None


def chosen(trials) -> int | None:
    best = largest_fitting(trials)
    return best and best.batch_size


@pytest.mark.parametrize("extrapolate", [False, True])
def test_sizes_are_doubled_then_bisected(extrapolate):
    ran: list[int] = []
    trials = search(line(ran), 500 + 10 * 300, 10**6, extrapolate=extrapolate)
    assert [trial.batch_size for trial in trials] == [2, 4, 8, 16, 32, 64, 128, 256, 512, 384, 320, 288]
    assert chosen(trials) == 288
    assert [trial.batch_size for trial in trials if not trial.fits] == [512, 384, 320]
    # Where running out of memory cannot be caught, nothing that would is run.
    assert ran == [2, 4, 8, 16, 32, 64, 128, 256, *([288] if extrapolate else [512, 384, 320, 288])]
    assert {trial.batch_size: trial.peak_mib for trial in trials}[512] == 500 + 10 * 512


def test_an_estimate_does_not_trust_what_malloc_kept_of_earlier_sizes():
    ran: list[int] = []

    def measure(size: int) -> Measured:
        ran.append(size)
        return Measured(500 + 8 * size, 500 + 10 * size, 1.0)  # the truth is 500 MiB without images

    search(measure, 500 + 10 * 100, 10**6, extrapolate=True)
    assert max(ran) <= 100


@pytest.mark.parametrize(
    ("limit", "expected"), [(37, 32), (100, 96), (8, 8), (7, 7), (5, 5), (3, 3), (1, 1), (0, None)]
)
def test_the_largest_that_does_not_run_out_of_memory(limit, expected):
    trials = search(below(limit), 10**6, 10**6, extrapolate=False)
    assert chosen(trials) == expected
    assert all(trial.verdict == "out of memory" for trial in trials if not trial.fits)
    assert trials[-1].batch_size == 1 or limit > 1


@pytest.mark.parametrize(("largest", "expected"), [(125, 120), (64, 64), (5, 5), (2, 2)])
def test_the_search_ends_at_the_largest_size_that_makes_sense(largest, expected):
    trials = search(below(10**6), 10**6, largest, extrapolate=False)
    assert chosen(trials) == trials[-1].batch_size == expected
    assert all(trial.fits for trial in trials)


def test_every_row_is_printed_as_soon_as_it_is_known(caplog):
    caplog.set_level("INFO")
    printed = []

    def measure(size: int) -> Measured | None:
        printed.append(len(caplog.messages))
        return below(20)(size)

    trials = search(measure, 15, 10**6, extrapolate=False)
    assert printed == list(range(1, len(trials) + 1))  # the header, and a row for each size before
    assert caplog.messages == [HEADER, *(trial.row() for trial in trials)]
    rows = {int(row.split()[0]): row for row in caplog.messages[1:]}
    assert rows[8].split() == ["8", "8", "100.0", "fits"]
    assert rows[16].split() == ["16", "16", "100.0", "too", "much"]
    assert len({len(row[: row.index("fits")]) for row in rows.values() if "fits" in row}) == 1
    assert rows[8].index("100.0") + 5 == len(HEADER)


def test_the_smallest_size_that_is_as_fast():
    speeds = {2: 10.0, 4: 50.0, 8: 96.0, 16: 100.0, 32: 99.0, 64: 200.0, 48: 200.0, 40: 200.0}
    trials = search(lambda size: Measured(1, size, speeds[size]), 32, 10**6, extrapolate=False)
    assert smallest_as_fast(trials) == 8  # those that do not fit are no choice, so their speed does not count


def test_what_was_chosen_is_read_without_torch():
    code = "import sys, src.engine.batch_size.batch_size_search; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("text", ["[]", "{}", '{"batch_size": 1e9}', '{"batch_size": "x"}', '{"batch_size": -1}', "{"])
def test_a_batch_size_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "batch_size.json").write_text(text)
    with pytest.raises(UserError) as caught:
        chosen_batch_size(tmp_path)
    assert caught.value.code == ExitCode.DATA
