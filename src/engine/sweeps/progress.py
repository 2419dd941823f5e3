"""The display of a sweep while it runs: a live table on a terminal, elsewhere a line for each trial that ends.

    with SweepDisplay(journal, Goal("val/acc", "max"), total=40, max_epochs=12, concurrent=2) as display:
        ...  # after every event that was written to the journal: display.changed(number)

The end of a sweep: src/engine/sweeps/results.py.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from src.engine.runs.text import decimal, duration
from src.engine.sweeps.sweep_journal import (
    FAILED,
    FINISHED,
    PAUSED,
    PRUNED,
    RUNNING,
    STOPPED,
    Goal,
    Journal,
    TrialRecord,
    ranking,
)

log = logging.getLogger(__name__)

DONE = (FINISHED, *STOPPED)
MOST_RUNNING, MOST_OTHERS = 12, 5  # what fits on the smallest screen; the last line counts them all
SILENCE_SECONDS = 60.0  # before a first trial ended, a line comes that often
STYLES = {RUNNING: "cyan", PRUNED: "yellow", PAUSED: "dim"}


class SweepDisplay:
    """Shows the trials of a journal as they change, from `with` to its end."""

    def __init__(
        self,
        journal: Journal,
        goal: Goal,
        *,
        total: int | None,
        max_epochs: int | None,
        concurrent: int,
        terminal: bool | None = None,
    ) -> None:
        """total: trials of the whole sweep, max_epochs: of a trial; None: not known. concurrent: trials at once.
        terminal: whether to draw the table; None: if stdout is a terminal.
        """
        self.journal, self.goal = journal, goal
        self.total, self.max_epochs, self.concurrent = total, max_epochs, concurrent
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        # Replaced where it grows: the thread that draws the table goes through it at any time.
        self._trials = {number: _waiting(trial) for number, trial in journal.trials.items()}
        self._durations: list[float] = []  # seconds of the trials that ended in this start of the sweep
        self._last_line = time.time()
        self._table = ExitStack()

    def __enter__(self) -> SweepDisplay:
        if self.terminal:
            stdout = sys.stdout
            self._table.enter_context(Live(self, console=Console(), refresh_per_second=2, transient=True))
            self._table.enter_context(_messages_redirected(stdout, sys.stdout))
        return self

    def __exit__(self, *error: object) -> None:
        self._table.close()

    def changed(self, number: int) -> None:
        """The journal has something new of this trial. Called by the thread that writes the journal."""
        trial = self.journal.trials[number]
        if number not in self._trials:
            self._trials = {**self._trials, number: trial}
        self._trials[number] = replace(trial, rows=dict(trial.rows))
        if trial.state in DONE:
            self._durations.append(trial.seconds)
            if trial.error or not self.terminal:
                log.info(self._line(trial))
        elif not (self.terminal or self._durations) and time.time() - self._last_line >= SILENCE_SECONDS:
            self._last_line = time.time()
            log.info(self._summary())

    def __rich__(self) -> Group:
        """The table: the running trials, the best of the others, and the line that sums up."""
        trials, now = self._trials, time.time()
        running = [trial for trial in trials.values() if trial.state == RUNNING]
        others = [trial for trial in ranking(trials, self.goal) if trial.state != RUNNING]
        names = short_names(trials.values())
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("trial", no_wrap=True)
        for name in names.values():  # only these get narrower where the screen is too small for all
            table.add_column(_one_line(name))
        for title in (self.goal.metric, "epoch", "state", "time"):
            table.add_column(title, no_wrap=True)
        for trial in running[:MOST_RUNNING] + others[:MOST_OTHERS]:
            epochs = str(max(trial.rows, default=0)) + (f"/{self.max_epochs}" if self.max_epochs else "")
            best, took = best_text(trial, self.goal), duration(trial.worked(now))
            cells = (f"#{trial.number}", *values_of(trial, names), best, epochs, trial.state, took)
            table.add_row(*map(_one_line, cells), style=STYLES.get(trial.state))
        return Group(table, Text(self._summary(), style="bold"))

    def _line(self, trial: TrialRecord) -> str:
        """'#7  pruned at epoch 2   val/acc 0.9012 (epoch 2)  lr=0.01 head=mlp   12 of 40 done, best #3 0.9831'"""
        names = short_names(self._trials.values())
        state = trial.state + (f" at epoch {max(trial.rows)}" if trial.state in STOPPED and trial.rows else "")
        best = best_text(trial, self.goal)
        result = trial.error or (f"{self.goal.metric} {best}" if best else f"no {self.goal.metric}")
        params = " ".join(f"{names[key]}={shown(value)}" for key, value in trial.params.items())
        sums = ", ".join(filter(None, [self._done(), self._best(), self._left()]))
        return f"#{trial.number:<3} {state:<18} {'  '.join(filter(None, [result, params]))}   {sums}"

    def _summary(self) -> str:
        """'12 of 40 done (5 pruned, 1 failed), 2 running, best #7 val/acc 0.9831, about 3 min left'"""
        counts = Counter(trial.state for trial in self._trials.values())
        lost = ", ".join(f"{counts[state]} {state}" for state in STOPPED if counts[state])
        others = [f"{counts[state]} {state}" for state in (RUNNING, PAUSED) if counts[state]]
        done = self._done() + (f" ({lost})" if lost else "")
        return ", ".join(filter(None, [done, *others, self._best(f"{self.goal.metric} "), self._left()]))

    def _done(self) -> str:
        done = sum(trial.state in DONE for trial in self._trials.values())
        return f"{done} done" if self.total is None else f"{done} of {self.total} done"

    def _best(self, metric: str = "") -> str:
        ranked = ranking(self._trials, self.goal)
        return f"best #{ranked[0].number} {metric}{decimal(ranked[0].best(self.goal)[0])}" if ranked else ""

    def _left(self) -> str:
        """How long the rest takes if its trials take as long as those that ended did; nothing before one did."""
        if self.total is None or not self._durations:
            return ""
        mean, now = fmean(self._durations), time.time()
        begun = [trial.worked(now) for trial in self._trials.values() if trial.state not in DONE]
        left = self.total - sum(trial.state in DONE for trial in self._trials.values())
        work = left * mean - sum(min(mean, seconds) for seconds in begun)
        return f"about {duration(max(1, round(work / min(left, self.concurrent))))} left" if left > 0 else ""


def _waiting(trial: TrialRecord) -> TrialRecord:
    """A trial of an earlier start: if it was not done, or failed, it waits to be run again."""
    return replace(trial, rows=dict(trial.rows), state=PAUSED if trial.state in (RUNNING, FAILED) else trial.state)


@contextmanager
def _messages_redirected(stdout: TextIO, table: TextIO) -> Iterator[None]:
    """Inside, log messages for stdout go to where Live sends what is printed: above the table, not into it."""
    handlers = [handler for handler in logging.getLogger().handlers if getattr(handler, "stream", None) is stdout]
    for handler in handlers:
        handler.setStream(table)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(stdout)


def _one_line(text: str) -> Text:
    """The text as it is: brackets are no markup, and the end of a long text is cut."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def short_names(trials: Iterable[TrialRecord]) -> dict[str, str]:
    """The swept parameters, key -> its short name: 'lr' for optimizer.lr, if no other key ends like that."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    ends = {key: key.lstrip("+").rpartition(".")[2] for key in keys}
    often = Counter(ends.values())
    return {key: end if often[end] == 1 else key.lstrip("+") for key, end in ends.items()}


def values_of(trial: TrialRecord, keys: Iterable[str]) -> list[str]:
    """The parameters of a trial as they are shown; '' for one that it lacks."""
    return [shown(trial.params[key]) if key in trial.params else "" for key in keys]


def best_text(trial: TrialRecord, goal: Goal) -> str:
    """'0.9831 (epoch 3)', '0.9831' of a job that reports no epochs, '' where nothing is known."""
    best = trial.best(goal)
    if best is None:
        return ""
    value, epoch = best
    return decimal(value) + (f" (epoch {epoch})" if epoch is not None else "")


def exact(value: Any) -> str:
    """The value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shown(value: Any) -> str:
    """The value for people: fractions with four digits."""
    if not isinstance(value, float):
        return exact(value)
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
