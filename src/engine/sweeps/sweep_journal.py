"""The journal of a sweep: a line of JSON per event in trials.jsonl, and the trials as they are read from it.

The driver writes it as results arrive, so nothing is lost whatever ends the sweep. The table, the ranking and the report are
made from it alone, and every start of the sweep goes on from it; nothing of Ray's is read.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.engine.commands.user_command import named
from src.engine.runs.errors import ExitCode, UserError

JOURNAL = "trials.jsonl"

RUNNING, FINISHED, PRUNED, FAILED = "running", "finished", "pruned", "failed"
DIVERGED = "diverged"  # a loss of nan or inf ended it: its value is the worst there is, and it is not tried again
PAUSED = "paused"  # it goes on later: told to by a scheduler, or the sweep was interrupted
STATES = (FINISHED, PRUNED, DIVERGED, FAILED, PAUSED, RUNNING)  # in which they are counted
STOPPED = (PRUNED, DIVERGED, FAILED)  # before their last epoch
NOT_RANKED = (DIVERGED, FAILED)
OVER = (FINISHED, PRUNED, DIVERGED)  # not tried again

# In place of nan and inf for schedulers and searches, which compare and average values: a single nan would spoil them all.
WORST = 1e30


@dataclass(frozen=True)
class Goal:
    """The metric of a sweep, and whether more of it is better (mode=max) or less (mode=min)."""

    metric: str
    mode: str

    @property
    def sign(self) -> int:
        """sign * value is the greater the better."""
        return 1 if self.mode == "max" else -1

    @property
    def worst(self) -> float:
        """A finite value below which no trial comes."""
        return -self.sign * WORST

    def finite(self, value: float | None) -> float:
        """The value as schedulers and searches are told it: the worst one for None, nan, inf and -inf."""
        return value if value is not None and math.isfinite(value) else self.worst

    def best(self, values: Iterable[float]) -> float | None:
        """The best of the finite values; None where there is none."""
        finite = [value for value in values if math.isfinite(value)]
        return max(finite, key=lambda value: self.sign * value, default=None)


@dataclass
class TrialRecord:
    """A trial, as far as the journal goes."""

    number: int
    folder: str
    params: dict[str, Any]  # the settings that differ between trials: key as typed -> value
    overrides: list[str]  # the whole command line of the trial, without `python -m src.train`
    state: str = RUNNING
    rows: dict[int, dict[str, float]] = field(default_factory=dict)  # epoch, counted from 1 -> its metrics
    value: float | None = None  # returned by the job
    error: str = ""  # the first line of its message
    started: float = 0.0  # seconds since 1970
    seconds: float = 0.0  # of work until `heard`, without pauses and the time between two starts of the sweep
    heard: float = 0.0  # when the last event came, seconds since 1970

    def worked(self, now: float) -> float:
        """Seconds of work until now (seconds since 1970)."""
        return self.seconds + (now - self.heard if self.state == RUNNING else 0.0)

    def best(self, goal: Goal) -> tuple[float, int | None] | None:
        """The best finite value so far and its first epoch; (value, None) of a job that reports nothing; None: no value."""
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
        """Reads the journal in the folder of a sweep, if there is one. Raises UserError for lines that no sweep has written.

        A last line that was cut off is left out, and so are other lines that are no JSON: `damaged` has their numbers, and
        those of the lines about a trial whose beginning was lost with them.
        """
        self.path = folder / JOURNAL
        self.trials: dict[int, TrialRecord] = {}
        self.order: dict[tuple[int, int], None] = {}  # (trial, epoch) of the rows as they came; (trial, 0): it was done
        self.damaged: list[int] = []
        content = self.path.read_bytes() if self.path.exists() else b""
        self._whole = content.rfind(b"\n") + 1  # bytes of the file that hold whole lines
        for place, line in enumerate(content[: self._whole].split(b"\n")[:-1], start=1):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                self.damaged.append(place)
                continue
            if not _is_event(event):
                raise UserError(
                    f"line {place} is of no sweep: {line[:60].decode(errors='replace')}",
                    where=str(self.path),
                    why="the folder comes from elsewhere, or the file was edited; a sweep goes on from this file alone",
                    fix=named(folder.name, "-2"),
                    code=ExitCode.DATA,
                )
            if event["event"] == "started" or event["trial"] in self.trials:
                self._apply(event)
            else:
                self.damaged.append(place)

    def started(self, number: int, folder: str, params: dict[str, Any], overrides: list[str]) -> None:
        params = {key: value if _is_json(value) else str(value) for key, value in params.items()}
        self._note(event="started", trial=number, folder=folder, params=params, overrides=overrides)

    def row(self, number: int, row: dict[str, float]) -> None:
        """The metrics of an epoch; row["epoch"] is counted from 1. nan and inf are left out, because JSON has neither."""
        self._note(event="row", trial=number, row=_finite(row))

    def copied(self, number: int, rows: Sequence[dict[str, float]]) -> None:
        """The trial goes on with the weights of another (scheduler=pbt). rows: of the epochs that led to them."""
        self._note(event="copied", trial=number, rows=[_finite(row) for row in rows])

    def ended(self, number: int, state: str, value: float | None = None, error: str = "") -> None:
        """state: FINISHED, PRUNED, FAILED, DIVERGED or PAUSED."""
        value = value if _is_json(value) else None
        self._note(event="ended", trial=number, state=state, value=value, error=error)

    def _note(self, **event: Any) -> None:
        event["time"] = round(time.time(), 2)
        self._apply(event)
        line = (json.dumps(event, allow_nan=False) + "\n").encode()
        with self.path.open("ab") as file:
            if file.tell() != self._whole:  # a line was cut off, by a crash or a full disk
                file.truncate(self._whole)
            file.write(line)
        self._whole += len(line)

    def _apply(self, event: dict[str, Any]) -> None:
        number = event["trial"]
        if event["event"] == "started":
            before = self.trials.get(number)
            trial = TrialRecord(number, event["folder"], event["params"], event["overrides"], started=event["time"])
            if before is not None:  # it goes on; pbt may have changed its parameters
                trial.rows, trial.started, trial.seconds = before.rows, before.started, before.seconds
            self.trials[number] = trial
        else:
            trial = self.trials[number]
            trial.seconds = trial.worked(event["time"])
            if event["event"] == "row":
                epoch = int(event["row"]["epoch"])
                trial.rows[epoch] = event["row"]
                self.order.setdefault((number, epoch))
            elif event["event"] == "copied":
                trial.rows = {int(row["epoch"]): row for row in event["rows"]}
            else:
                trial.state, trial.value, trial.error = event["state"], event["value"], event["error"]
                if trial.state in OVER:
                    self.order.setdefault((number, 0))
        trial.heard = event["time"]


def _finite(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if math.isfinite(value)}


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _is_event(event: Any) -> bool:
    """Whether this module, or an older version, writes such a line."""
    match event:
        case {"trial": int(number), "time": time_} if 0 <= number < 10**9 and _is_number(time_) and 0 <= time_ < 1e12:
            pass
        case _:
            return False
    match event:
        case {"event": "started", "folder": str(), "params": dict(params), "overrides": list(words)}:
            plain = (value is None or isinstance(value, str | int | float) for value in params.values())
            return all(plain) and all(isinstance(word, str) for word in words)
        case {"event": "row", "row": row}:
            return _is_row(row)
        case {"event": "copied", "rows": list(rows)}:
            return all(map(_is_row, rows))
        case {"event": "ended", "state": str(state), "value": value, "error": str()}:
            return state in (*OVER, FAILED, PAUSED) and (value is None or _is_number(value))
    return False


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(map(_is_number, row.values())) and 1 <= row.get("epoch", 0) < 10**9


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**18)


def ranking(trials: dict[int, TrialRecord], goal: Goal) -> list[TrialRecord]:
    """The trials that have a value and did not fail, the best first; of equal ones the earlier."""
    bests = {number: trial.best(goal) for number, trial in trials.items() if trial.state not in NOT_RANKED}
    values = {number: best[0] for number, best in bests.items() if best is not None}
    return [trials[number] for number in sorted(values, key=lambda number: (-goal.sign * values[number], number))]


def counted(trials: dict[int, TrialRecord]) -> str:
    """'9 trials: 6 finished, 3 pruned'"""
    counts = Counter(trial.state for trial in trials.values())
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{len(trials)} trial{'s' if len(trials) != 1 else ''}: {states}"
