"""A run's side of a sweep: it reports every epoch and is told whether to go on.

A trial is a job in a thread of a worker (src/engine/sweeps/trainable.py); `current()` tells a run whether it is one. A run of
several processes (strategy=ddp) does not train in the worker: its rank 0 reports through a socket. This imports neither
ray nor torch.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from src.engine.features import Place

# Answers to a report.
GO_ON = "go on"
FINISH = "finish"  # stopped early: measure, package and end
INTERRUPT = "interrupt"  # end now; the trial goes on later from its position

# Environment of the processes of a trial that has several.
ADDRESS, TOKEN, FINISH_AFTER = "TRIAL_ADDRESS", "TRIAL_TOKEN", "TRIAL_FINISH_AFTER"


class Trial:
    """One job of a sweep: `report` hands a row to the sweep and waits for its answer.

    keeps_checkpoints: the scheduler copies checkpoints between trials, so an epoch's must be on the disk before its report.
    finish_after: the epoch, counted from 1, after which the sweep ended the trial in an earlier start.
    """

    def __init__(
        self, keeps_checkpoints: bool = False, place: Place | None = None, finish_after: int | None = None
    ) -> None:
        self.keeps_checkpoints, self.place, self.finish_after = keeps_checkpoints, place or Place(), finish_after
        self.interrupted = False  # asked after every step: end as soon as the position is saved
        self._rows: queue.Queue[dict[str, float]] = queue.Queue()
        self._answers: queue.Queue[str] = queue.Queue()
        self._last_answer = GO_ON

    def report(self, row: dict[str, float]) -> str:
        """Called by the job. row: the metrics of an epoch; row["epoch"] is counted from 1. Returns the answer."""
        if self._last_answer == GO_ON:
            self._rows.put(row)
            self._last_answer = self._answers.get()
        return self._last_answer

    def next_row(self, seconds: float) -> dict[str, float] | None:
        """Called by the worker: the reported row; {} when the job is over; None if nothing came within `seconds`."""
        try:
            return self._rows.get(timeout=seconds)
        except queue.Empty:
            return None

    def over(self) -> None:
        """The job has ended."""
        self._rows.put({})

    def answering_processes(self) -> AbstractContextManager[dict[str, str]]:
        """See below: for the command that starts the run's processes."""
        return answering_processes(self)

    def answer(self, answer: str) -> None:
        """Answers the report that waits, or the next one."""
        self.interrupted |= answer == INTERRUPT
        self._answers.put(answer)


class ReportingProcess(Trial):
    """In a rank of a trial that has several: rank 0's reports travel to the worker, the others have none."""

    def __init__(self) -> None:
        finish_after = os.environ.get(FINISH_AFTER)
        super().__init__(keeps_checkpoints=True, finish_after=int(finish_after) if finish_after else None)
        self._connection: socket.socket | None = None

    def report(self, row: dict[str, float]) -> str:
        if self._connection is None:
            host, _, port = os.environ[ADDRESS].rpartition(":")
            self._connection = socket.create_connection((host, int(port)))
        line = json.dumps({"token": os.environ[TOKEN], "row": row}) + "\n"
        self._connection.sendall(line.encode())
        with self._connection.makefile(encoding="utf-8") as answers:
            return answers.readline().strip() or INTERRUPT  # the worker is gone


_current: Trial | None = None


def current() -> Trial | None:
    """The trial that this process runs, or None outside of a sweep with Ray Tune."""
    if _current is None and ADDRESS in os.environ:
        return ReportingProcess()
    return _current


@contextmanager
def working_on(trial: Trial) -> Iterator[None]:
    """Inside, `current()` is the trial."""
    global _current
    _current = trial
    try:
        yield
    finally:
        _current = None


@contextmanager
def answering_processes(trial: Trial) -> Iterator[dict[str, str]]:
    """Inside, rank 0 of a trial can report to it. Yields the environment variables that its processes need."""
    token = secrets.token_hex(16)  # else any user of the machine could report
    with socket.create_server(("127.0.0.1", 0)) as server:
        _in_background(_accept, server, token, trial.report)
        try:
            variables = {ADDRESS: f"127.0.0.1:{server.getsockname()[1]}", TOKEN: token}
            if trial.finish_after is not None:
                variables[FINISH_AFTER] = str(trial.finish_after)
            yield variables
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # ends accept(), which closing does not


def _in_background(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _accept(server: socket.socket, token: str, report: Callable[[dict[str, float]], str]) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # the processes have ended, and the server is closed
            return
        _in_background(_serve, connection, token, report)


def _serve(connection: socket.socket, token: str, report: Callable[[dict[str, float]], str]) -> None:
    """Any user of the machine can connect and send anything or nothing; a process can be killed while it waits."""
    errors = suppress(OSError, ValueError, KeyError, TypeError)
    with errors, connection, connection.makefile("rw", encoding="utf-8") as file:
        for line in file:
            message = json.loads(line)
            if message["token"] != token:
                break
            file.write(report(message["row"]) + "\n")
            file.flush()
