"""What is seen of a sweep while it runs, as text: the live table, the lines elsewhere, and that they do not mix."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from src.engine.sweeps import sweep_journal
from src.engine.sweeps.progress import SweepDisplay, duration, short_names
from src.engine.sweeps.sweep_journal import FAILED, FINISHED, PAUSED, PRUNED, Goal, Journal

LOGGER = "src.engine.sweeps.progress"


class Sweep:
    """A sweep that is played: events go to the journal and to the display, and the time is ours."""

    def __init__(self, folder, **settings) -> None:
        self.now = 1000.0
        self.journal = Journal(folder)
        self.settings = {"total": 40, "max_epochs": 12, "concurrent": 2, "terminal": False} | settings
        self.metric, self.mode = self.settings.pop("metric", "val/acc"), self.settings.pop("mode", "max")
        self.begin()

    def begin(self) -> None:
        """A start of the sweep, with the journal as it is on disk."""
        self.journal = Journal(self.journal.path.parent)
        self.display = SweepDisplay(self.journal, Goal(self.metric, self.mode), **self.settings)

    def started(self, number: int, **params) -> None:
        params = {name.replace("__", "."): value for name, value in params.items()}
        self.journal.started(number, f"runs/x/{number}", params, [])
        self.display.changed(number)

    def row(self, number: int, epoch: int, value: float, after: float = 0.0) -> None:
        self.now += after
        self.journal.row(number, {"epoch": epoch, self.metric: value})
        self.display.changed(number)

    def ended(self, number: int, state: str, after: float = 0.0, **result) -> None:
        self.now += after
        self.journal.ended(number, state, **result)
        self.display.changed(number)

    def drawn(self, width: int = 100) -> list[str]:
        """The lines of the table on a screen of that width."""
        console = Console(file=io.StringIO(), width=width)
        console.print(self.display)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.fixture
def sweep(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, LOGGER)
    sweeps = []

    def make(**settings) -> Sweep:
        sweeps.append(Sweep(tmp_path, **settings))
        return sweeps[-1]

    monkeypatch.setattr(sweep_journal.time, "time", lambda: sweeps[-1].now if sweeps else 1000.0)
    return make


def halfway(sweep) -> Sweep:
    """Two trials run, one each has finished, was pruned and failed."""
    one = sweep()
    one.started(0, optimizer__lr=0.001, model__head="linear")
    one.started(1, optimizer__lr=3.16227766e-5, model__head="mlp")
    one.row(0, 1, 0.8, after=60)
    one.row(0, 2, 0.85, after=60)
    one.row(1, 1, 0.95)
    one.ended(0, FINISHED, value=0.85)
    one.started(2, optimizer__lr=0.1, model__head="[red]mlp")
    one.row(2, 1, 0.3, after=20)
    one.ended(2, PRUNED)
    one.started(3, optimizer__lr=0.1, model__head="append")
    one.ended(3, FAILED, error="ValueError: boom")
    one.started(4, optimizer__lr=0.02, model__head="mlp")
    one.now += 5
    return one


def test_the_table_shows_running_trials_then_the_best_others_then_the_sum(sweep):
    assert halfway(sweep).drawn() == [
        "trial  lr        head      val/acc           epoch  state     time",
        "#1     3.162e-5  mlp       0.9500 (epoch 1)  1/12   running   2 min",
        "#4     0.02      mlp                         0/12   running   5 s",
        "#0     0.001     linear    0.8500 (epoch 2)  2/12   finished  2 min",
        "#2     0.1       [red]mlp  0.3000 (epoch 1)  1/12   pruned    20 s",
        "3 of 40 done (1 pruned, 1 failed), 2 running, best #1 val/acc 0.9500, about 14 min left",
    ]


def test_what_is_drawn_is_a_copy_since_another_thread_draws_it(sweep):
    one = sweep()
    one.started(0)
    one.row(0, 1, 0.8)
    one.journal.row(0, {"epoch": 2, "val/acc": 0.9})
    assert one.drawn()[1].split()[1:5] == ["0.8000", "(epoch", "1)", "1/12"]
    one.display.changed(0)
    assert one.drawn()[1].split()[1:5] == ["0.9000", "(epoch", "2)", "2/12"]


def test_before_the_first_end_nobody_knows_how_long_it_takes(sweep):
    one = sweep()
    assert one.drawn()[-1] == "0 of 40 done"
    one.started(0)
    one.row(0, 1, 0.8, after=60)
    assert one.drawn()[-1] == "0 of 40 done, 1 running, best #0 val/acc 0.8000"


def test_a_sweep_without_a_known_number_of_trials_or_epochs(sweep):
    one = sweep(total=None, max_epochs=None, metric="val/loss", mode="min")
    one.started(0)
    one.row(0, 7, 0.8)
    one.row(0, 8, 0.9)
    one.ended(0, FINISHED, after=60)
    assert one.drawn() == [
        "trial  val/loss          epoch  state     time",
        "#0     0.8000 (epoch 7)  8      finished  1 min",
        "1 done, best #0 val/loss 0.8000",
    ]


def test_five_hundred_trials_fit_on_a_screen_of_24_lines_of_80_columns(sweep):
    one = sweep(total=500)
    for number in range(500):
        one.started(
            number, model__backbone="efficientnet_lite0", model__weights="runs/a/long/path/to/the/model", a=1, b=2
        )
        one.row(number, 1, number / 1000)
        if number >= 40:
            one.ended(number, FINISHED, after=1)
    lines = one.drawn(width=80)
    assert len(lines) <= 23
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines if "running " in line][:2] == ["#0", "#1"]
    assert [line.split()[0] for line in lines if "finished" in line] == ["#499", "#498", "#497", "#496", "#495"]
    assert "0.4990 (epoch 1)" in "\n".join(lines)
    assert "460 of 500 done, 40 running" in lines[-2] + lines[-1]


def test_what_an_earlier_start_left_waits_and_its_time_does_not_count(sweep):
    one = sweep(total=6, concurrent=1)
    one.started(0)
    one.ended(0, FINISHED, after=600, value=0.5)
    one.started(1)
    one.ended(1, FAILED, error="ValueError: boom")
    one.started(2)  # runs when the driver is killed
    one.begin()
    assert one.drawn()[-1] == "1 of 6 done, 2 paused, best #0 val/acc 0.5000"
    one.started(2)
    one.ended(2, FINISHED, after=120, value=0.4)
    assert one.drawn()[-1] == "2 of 6 done, 1 paused, best #0 val/acc 0.5000, about 8 min left"


def test_what_is_left_is_less_by_what_running_trials_did(sweep):
    one = sweep(total=4, concurrent=2)
    for number in range(3):
        one.started(number)
    one.ended(0, FINISHED, after=600)
    assert one.drawn()[-1].endswith("about 5 min left")  # of three trials two have worked as long as the mean
    one.now += 300
    assert one.drawn()[-1].endswith("about 5 min left")  # they are late, which tells nothing of the fourth
    one.ended(1, FINISHED)
    one.ended(2, FINISHED)
    one.started(3)
    one.now += 800
    assert one.drawn()[-1].endswith("about 1 s left")
    one.ended(3, FINISHED)
    assert "left" not in one.drawn()[-1]


def test_the_last_trials_are_not_divided_by_places_that_stay_empty(sweep):
    one = sweep(total=2, concurrent=8)
    one.started(0)
    one.ended(0, FINISHED, after=600)
    assert one.drawn()[-1].endswith("about 10 min left")


def test_elsewhere_a_line_is_printed_when_a_trial_ends(sweep, caplog):
    halfway(sweep)
    assert [re.sub("  +", "  ", line) for line in caplog.messages] == [
        "0 of 40 done, 2 running, best #0 val/acc 0.8000",
        "0 of 40 done, 2 running, best #0 val/acc 0.8500",
        "#0  finished  val/acc 0.8500 (epoch 2)  lr=0.001 head=linear  1 of 40 done, best #1 0.9500, about 38 min left",
        "#2  pruned at epoch 1  val/acc 0.3000 (epoch 1)  lr=0.1 head=[red]mlp  "
        "2 of 40 done, best #1 0.9500, about 22 min left",
        "#3  failed  ValueError: boom  lr=0.1 head=append  3 of 40 done, best #1 0.9500, about 14 min left",
    ]


def test_a_sweep_in_which_nothing_has_ended_says_so_once_a_minute(sweep, caplog):
    one = sweep()
    one.started(0)
    for epoch in range(1, 14):
        one.row(0, epoch, 0.5, after=10)
    assert caplog.messages == ["0 of 40 done, 1 running, best #0 val/acc 0.5000"] * 2
    one.ended(0, PAUSED)
    assert len(caplog.messages) == 2
    one.started(1)
    one.ended(1, FINISHED)
    one.started(2)
    one.row(2, 1, 0.5, after=600)
    assert len(caplog.messages) == 3
    assert "#1   finished           no val/acc   1 of 40 done" in caplog.messages[-1]


def test_a_name_is_short_where_no_other_ends_like_it(sweep):
    one = sweep()
    one.started(0, optimizer__lr=1, data__name="a")
    one.started(1, **{"+extra.name": "b", "model": "c"})
    names = {"optimizer.lr": "lr", "data.name": "data.name", "+extra.name": "extra.name", "model": "model"}
    assert short_names(one.journal.trials.values()) == names
    assert one.drawn()[0].split()[:5] == ["trial", *names.values()]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.24, "1.2 s"), (12, "12 s"), (119.7, "2 min"), (90, "2 min"), (3000, "50 min"), (7200, "2 h"), (9000, "2.5 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    """A terminal that remembers what is on it: rich moves the cursor up and erases lines, and nothing else."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines: dict[int, str] = {}
        row = column = 0
        for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if part == "\r":
                column = 0
            elif part == "\n":  # the terminal driver of a real one adds the return to the first column
                row, column = row + 1, 0
            elif part.endswith("A"):
                row -= int(part[2:-1])
            elif part.endswith("K"):
                lines[row] = ""
            elif not part.startswith("\x1b"):
                before = lines.get(row, "").ljust(column)
                lines[row] = before[:column] + part + before[column + len(part) :]
                column += len(part)
        return [lines.get(row, "").rstrip() for row in range(max(lines) + 1)]


def test_messages_stand_above_the_table_which_is_whole_and_gone_at_the_end(sweep, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    handler = logging.StreamHandler(sys.stdout)  # as src/engine/runs/logs.py makes it, long before the sweep
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    messages = ["one", "two", "three", "four", "five", "six"]
    one = sweep(terminal=None)
    with one.display:
        for number, (first, second) in enumerate(zip(messages[::2], messages[1::2], strict=True)):
            one.started(number)
            logging.getLogger("src.elsewhere").warning(first)
            print(second)
        one.ended(0, FINISHED, value=0.5)
        one.ended(1, FAILED, error="ValueError: boom")
        print("last")
        during = terminal.screen()
    assert during[:6] == messages
    assert during[6].startswith("#1   failed             ValueError: boom")  # that one is printed here too
    assert during[7:] == [
        "last",
        "trial  val/acc  epoch  state     time",
        "#2              0/12   running   0 s",
        "#0     0.5000   0/12   finished  0 s",
        "2 of 40 done (1 failed), 1 running, best #0 val/acc 0.5000, about 1 s left",
    ]
    logging.getLogger("src.elsewhere").warning("after")
    assert handler.stream is terminal
    assert "".join(terminal.screen()[8:]) == "after"
