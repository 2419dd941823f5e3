"""What happened in a sweep: a line of JSON per event in trials.jsonl, and the trials as they are read from it.

The driver writes it as results arrive, so a sweep that ends in any way leaves all that is known of it. The table, the
ranking and the report are made from it alone; Ray's own state is only for Ray.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.run_dir import write_text
from src.tuning.goal import Goal

JOURNAL = "trials.jsonl"

RUNNING, FINISHED, PRUNED, FAILED = "running", "finished", "pruned", "failed"
DIVERGED = "diverged"  # a loss of nan or inf ended it: its value is the worst there is, and it is not tried again
PAUSED = "paused"  # it goes on later: told to by a scheduler, or the sweep was interrupted
STATES = (FINISHED, PRUNED, DIVERGED, FAILED, PAUSED, RUNNING)  # in which they are counted
STOPPED = (PRUNED, DIVERGED, FAILED)  # before their last epoch
NOT_RANKED = (DIVERGED, FAILED)


@dataclass
class TrialRecord:
    """One trial as it is known so far."""

    number: int
    folder: str
    params: dict[str, Any]  # what differs between trials: key as typed -> value
    overrides: list[str]  # the whole command line of the trial, without `python -m src.train`
    state: str = RUNNING
    rows: dict[int, dict[str, float]] = field(default_factory=dict)  # epoch, counted from 1 -> what was reported
    value: float | None = None  # what the job returned
    error: str = ""  # the first line of what went wrong
    started: float = 0.0  # seconds since 1970
    ended: float | None = None
    seconds: float = 0.0  # of work until `heard`: the time between two starts of a sweep, or of a pause, is not in it
    heard: float = 0.0  # when the last event came
    was_pruned: bool = False  # before it was started again: Tune had not saved its end when the sweep was killed

    def worked(self, now: float) -> float:
        """Seconds of work until now (seconds since 1970)."""
        return self.seconds + (now - self.heard if self.state == RUNNING else 0.0)

    def best(self, goal: Goal) -> tuple[float, int | None] | None:
        """The best finite value so far and its epoch, of equal ones the first; (value, None) of a job that reports nothing;
        None where nothing is known."""
        rows = {epoch: row.get(goal.metric, math.nan) for epoch, row in sorted(self.rows.items())}
        value = goal.best(rows.values())
        if value is not None:
            return value, next(epoch for epoch, one in rows.items() if one == value)
        if self.rows or self.value is None or not math.isfinite(self.value):  # beside rows it may be of another metric
            return None
        return self.value, None


class Journal:
    """The journal of one sweep: `trials` is what it says so far, by number."""

    def __init__(self, folder: Path) -> None:
        """folder: of the sweep. What is there already is read; a last line that was cut off is left out."""
        self.path = folder / JOURNAL
        self.trials: dict[int, TrialRecord] = {}
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            for line in whole.splitlines():
                self._apply(json.loads(line))
            if whole != text:
                write_text(self.path, whole)

    def started(self, number: int, folder: str, params: dict[str, Any], overrides: list[str]) -> None:
        self._note(event="started", trial=number, folder=folder, params=params, overrides=overrides)

    def row(self, number: int, row: dict[str, float]) -> None:
        """What a trial reported of an epoch; row["epoch"] is counted from 1."""
        self._note(event="row", trial=number, row=row)

    def ended(self, number: int, state: str, value: float | None = None, error: str = "") -> None:
        """state: FINISHED, PRUNED, FAILED, DIVERGED or PAUSED."""
        self._note(event="ended", trial=number, state=state, value=value, error=error)

    def _note(self, **event: Any) -> None:
        event["time"] = round(time.time(), 2)
        self._apply(event)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def _apply(self, event: dict[str, Any]) -> None:
        number = event["trial"]
        if event["event"] == "started":
            before = self.trials.get(number)
            trial = TrialRecord(number, event["folder"], event["params"], event["overrides"], started=event["time"])
            if before is not None:  # it goes on; pbt may have changed its parameters
                trial.rows, trial.started, trial.seconds = before.rows, before.started, before.seconds
                trial.was_pruned = before.state == PRUNED
            self.trials[number] = trial
        else:
            trial = self.trials[number]
            trial.seconds = trial.worked(event["time"])
            if event["event"] == "row":
                trial.rows[int(event["row"]["epoch"])] = event["row"]
            else:
                trial.state, trial.value, trial.error = event["state"], event["value"], event["error"]
                trial.ended = event["time"]
        trial.heard = event["time"]


def ranking(trials: dict[int, TrialRecord], goal: Goal) -> list[TrialRecord]:
    """The trials that have a value and did not fail, the best first; of equal ones the earlier."""
    known = [(trial.best(goal), trial) for trial in trials.values() if trial.state not in NOT_RANKED]
    valued = [(-goal.sign * best[0], trial.number, trial) for best, trial in known if best is not None]
    return [trial for *_, trial in sorted(valued, key=lambda one: one[:2])]
