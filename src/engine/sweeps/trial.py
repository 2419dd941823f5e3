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
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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

    def answer(self, answer: str) -> None:
        """Answers the report that waits, or the next one."""
        self.interrupted |= answer == INTERRUPT
        self._answers.put(answer)

    @contextmanager
    def answering_processes(self) -> Iterator[dict[str, str]]:
        """Inside, rank 0 of the trial can report to it. Yields the environment variables that its processes need."""
        trial, token = self, secrets.token_hex(16)  # any user of the machine can connect

        class Report(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                """Any user can connect and send anything or nothing; a process can be killed while it waits."""
                with suppress(OSError, ValueError, KeyError, TypeError):
                    message = json.loads(self.rfile.readline())
                    if message["token"] == token:
                        self.wfile.write(f"{trial.report(message['row'])}\n".encode())

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Report) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
            try:
                variables = {ADDRESS: f"127.0.0.1:{server.server_address[1]}", TOKEN: token}
                if self.finish_after is not None:
                    variables[FINISH_AFTER] = str(self.finish_after)
                yield variables
            finally:
                server.shutdown()


class ReportingProcess(Trial):
    """In a rank of a trial that has several: rank 0's reports travel to the worker, the others have none."""

    def __init__(self) -> None:
        finish_after = os.environ.get(FINISH_AFTER)
        super().__init__(keeps_checkpoints=True, finish_after=int(finish_after) if finish_after else None)

    def report(self, row: dict[str, float]) -> str:
        host, _, port = os.environ[ADDRESS].rpartition(":")
        with socket.create_connection((host, int(port))) as connection, connection.makefile("rw") as file:
            file.write(json.dumps({"token": os.environ[TOKEN], "row": row}) + "\n")
            file.flush()
            return file.readline().strip() or INTERRUPT  # the worker is gone


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
