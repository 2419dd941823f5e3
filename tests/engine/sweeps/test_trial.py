"""What a run and the sweep that it is a trial of say to each other, in one process and in several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from src.engine.sweeps.trial import (
    ADDRESS,
    FINISH,
    GO_ON,
    INTERRUPT,
    TOKEN,
    ReportingProcess,
    Trial,
    current,
    working_on,
)
from tests.warm import ROOT

ROW = {"epoch": 1, "val/acc": 0.5}
LONG, SHORT = 30, 0.2  # seconds: to wait for what comes, and for what must not


@pytest.fixture
def job():
    """The thread of a job."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def trial(job):
    """Whoever still waits at the end of a test gets an answer, so that a failed test ends too."""
    trial = Trial()
    yield trial
    for _ in range(5):
        trial.answer(INTERRUPT)


def test_a_report_waits_for_its_answer(trial, job):
    reported = job.submit(trial.report, ROW)
    assert trial.next_row(LONG) == ROW
    with pytest.raises(TimeoutError):
        reported.result(SHORT)
    trial.answer(GO_ON)
    assert reported.result(LONG) == GO_ON
    again = job.submit(trial.report, ROW | {"epoch": 2})
    assert trial.next_row(LONG)["epoch"] == 2
    with pytest.raises(TimeoutError):
        again.result(SHORT)


@pytest.mark.parametrize("last", [FINISH, INTERRUPT])
def test_the_last_answer_holds_for_all_later_reports(trial, job, last):
    """A run may report once more before it ends, when nobody listens."""
    trial.answer(last)
    assert trial.report(ROW) == last
    assert trial.next_row(0) == ROW
    assert job.submit(trial.report, ROW).result(LONG) == last
    assert trial.next_row(0) is None


def test_nothing_comes_for_some_time_and_then_the_job_is_over(trial):
    assert trial.next_row(0.01) is None
    trial.over()
    assert trial.next_row(LONG) == {}


def test_only_an_interruption_is_seen_between_reports(trial):
    for answer, seen in ((GO_ON, False), (FINISH, False), (INTERRUPT, True), (GO_ON, True)):
        trial.answer(answer)
        assert trial.interrupted is seen


def test_the_trial_at_hand():
    assert current() is None
    trial = Trial()
    with working_on(trial):
        assert current() is trial
    assert current() is None
    with suppress(RuntimeError), working_on(trial):
        raise RuntimeError("of the job")
    assert current() is None


REPORTS = """
import sys
from src.engine.sweeps.trial import current
trial = current()
print(trial.keeps_checkpoints, [trial.report({"epoch": epoch, "val/acc": 0.1 * epoch}) for epoch in (1, 2, 3)])
print([name for name in ("ray", "torch") if name in sys.modules])
"""


def process_that(program: str, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, **environment}, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_a_process_reports_and_hears_every_answer(trial):
    with trial.answering_processes() as environment, process_that(REPORTS, environment) as process:
        for epoch, answer in ((1, GO_ON), (2, GO_ON), (3, FINISH)):
            assert trial.next_row(LONG) == {"epoch": epoch, "val/acc": 0.1 * epoch}
            trial.answer(answer)
        printed = process.communicate(timeout=LONG)[0].splitlines()
    assert printed == [f"True {[GO_ON, GO_ON, FINISH]}", "[]"]


@pytest.fixture
def serving(trial, monkeypatch):
    """The worker listens, and this process has the environment of a process of the trial."""
    with trial.answering_processes() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield trial


def test_in_such_a_process_the_trial_is_the_workers(serving, job):
    process = current()
    assert isinstance(process, ReportingProcess)
    serving.answer(GO_ON)
    assert job.submit(process.report, ROW).result(LONG) == GO_ON
    assert serving.next_row(LONG) == ROW


def test_another_token_is_refused_and_the_right_one_still_taken(serving, job, monkeypatch):
    own = os.environ[TOKEN]
    monkeypatch.setenv(TOKEN, "0" * len(own))
    serving.answer(GO_ON)
    assert job.submit(ReportingProcess().report, ROW).result(LONG) == INTERRUPT
    assert serving.next_row(SHORT) is None
    monkeypatch.setenv(TOKEN, own)
    assert job.submit(ReportingProcess().report, ROW).result(LONG) == GO_ON


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[1]\n", b"\xff\n", b""], ids=repr)
def test_a_stranger_does_not_end_the_listening(serving, job, said):
    with socket.create_connection(os.environ[ADDRESS].split(":")) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(LONG)
        assert stranger.recv(1) == b"", "it gets no answer"
    reports_and_is_answered(serving, job)


def test_a_stranger_that_stays_and_says_nothing_keeps_nobody_waiting(serving, job):
    with socket.create_connection(os.environ[ADDRESS].split(":")):
        reports_and_is_answered(serving, job)


def reports_and_is_answered(serving, job):
    serving.answer(GO_ON)
    assert job.submit(ReportingProcess().report, ROW).result(LONG / 10) == GO_ON


def served_in(before: set[threading.Thread]) -> threading.Thread:
    (thread,) = set(threading.enumerate()) - before
    return thread


def test_no_thread_is_left_behind(trial):
    before = set(threading.enumerate())
    with trial.answering_processes() as environment:
        thread = served_in(before)
    thread.join(LONG)
    assert not thread.is_alive()
    host, port = environment[ADDRESS].split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_is_killed_while_it_waits_leaves_no_thread_behind(trial):
    """The next answer of the sweep is for nobody."""
    before = set(threading.enumerate())
    with trial.answering_processes() as environment, process_that(REPORTS, environment) as process:
        assert trial.next_row(LONG)["epoch"] == 1
        threads = set(threading.enumerate()) - before
        process.kill()
    trial.answer(GO_ON)
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
