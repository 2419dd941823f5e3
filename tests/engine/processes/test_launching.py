"""Starting and watching processes, with small programs in the place of trainings: which failure is the one that is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.backends.cpu import get_cpu_capability

from src.engine.commands import config_checks
from src.engine.commands.user_command import shell_command
from src.engine.processes import launching
from src.engine.runs.errors import ErrorOfProcess, Terminated, UserError

FINISH = "(path / 'result.json').write_text(json.dumps({'metrics': {'val/acc': 0.5}}))"
HEAD = """
import json, os, sys, time, signal, yaml
from pathlib import Path
job = yaml.safe_load(sys.stdin)
path, rank = Path(job["path"]), int(os.environ["RANK"])
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """run(program): two processes of this Python program in the place of src.rank."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(launching, "GRACE_SECONDS", 1.0)
    config = config_checks.read(
        {
            "data": {"source": "digits"},
            "model": {"backbone": "resnet18"},
            "optimizer": {"name": "adamw", "lr": 0.1},
            "strategy": {"name": "ddp"},
            "precision": {"name": "fp32"},
            "trainer": {"devices": 2},
            "freeze": {"phases": {0: ["head"]}},
        }
    )

    def start(program: str) -> Any:
        (tmp_path / "src" / "rank.py").write_text(HEAD + program)
        return launching.run_in_processes(config, tmp_path, 2)

    return start


def test_every_process_gets_the_job_and_its_place(run, tmp_path):
    program = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANKS_STORE", "TRAIN_COMMAND")
seen = {name: os.environ[name] for name in names}
(path / f"seen{rank}").write_text(yaml.safe_dump([job, os.getppid(), seen]))
"""
    assert run(program + FINISH) == 0.5
    both = [yaml.safe_load((tmp_path / f"seen{rank}").read_text()) for rank in (0, 1)]
    for rank, (job, parent, seen) in enumerate(both):
        assert job["config"]["freeze"]["phases"] == {0: ["head"]}, "numbers as keys came out as something else"
        assert job["parent"] == parent == os.getpid()
        assert (seen["RANK"], seen["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert seen["TRAIN_COMMAND"] == shell_command()
    assert both[0][2]["RANKS_STORE"] == both[1][2]["RANKS_STORE"]


@pytest.mark.numbers
@pytest.mark.parametrize("setting", ["default", None])
def test_every_process_computes_with_the_instructions_of_the_command(run, tmp_path, monkeypatch, setting):
    """With which .ci/run imitates older CPUs. setting: of ATEN_CPU_CAPABILITY; None: as the tests themselves."""
    if setting:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", setting)
    program = """
import torch
(path / f"seen{rank}").write_text(f"{torch.backends.cpu.get_cpu_capability()} {os.environ.get('ONEDNN_MAX_CPU_ISA')}")
"""
    run(program + FINISH)
    expected = f"{setting.upper() if setting else get_cpu_capability()} {os.environ.get('ONEDNN_MAX_CPU_ISA')}"
    assert {(tmp_path / f"seen{rank}").read_text() for rank in (0, 1)} == {expected}


def test_nothing_is_left_in_the_environment(run):
    """Also where the job is in another thread than the main one, as a trial of Ray is: no signal handler is needed."""
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run, FINISH).result() == 0.5
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TRAIN_COMMAND"} & set(os.environ)


def test_the_cause_is_told_and_not_what_followed_from_it(run):
    """Process 0 lost its connection first; process 1 says why."""
    with pytest.raises(ErrorOfProcess) as error:
        run("""
if rank == 0:
    print("ERROR   lost  (exit code 76)", file=sys.stderr); sys.exit(76)
time.sleep(0.3)
print("some library's noise\\nERROR   bad image  (exit code 65)\\nwhy     it is", file=sys.stderr)
sys.exit(65)
""")
    assert error.value.code == 65
    assert error.value.render() == "ERROR   bad image  (exit code 65)\nprocess 1 of the 2 processes\nwhy     it is"


def test_a_loader_that_was_killed_is_told_and_not_the_connection_that_was_lost(run):
    """Both end with 76."""
    with pytest.raises(ErrorOfProcess, match="a loader process"):
        run("""
if rank == 0:
    print("ERROR   the connection to another process of this run is lost  (exit code 76)", file=sys.stderr)
    sys.exit(76)
time.sleep(0.2)
print("ERROR   a loader process (pid 3) was ended by SIGKILL  (exit code 76)", file=sys.stderr)
sys.exit(76)
""")


def test_a_killed_process_is_named(run):
    with pytest.raises(UserError, match=r"process 1 of the 2 processes was killed \(SIGKILL\)") as error:
        run("time.sleep(0.2 if rank else 60); os.kill(os.getpid(), signal.SIGKILL)")
    assert error.value.code == 76


def test_a_process_that_hangs_after_a_failure_is_killed_and_named(run):
    start = time.monotonic()
    with pytest.raises(UserError, match="process 1 of the 2 processes no longer answered"):
        run("sys.exit(76) if rank == 0 else time.sleep(60)")
    assert time.monotonic() - start < 30, "it waited for the one that hangs"


def test_processes_that_agreed_to_stop_are_waited_for(run, tmp_path):
    """The first may need long to write its last checkpoint: more than the time that is given after a failure."""
    with pytest.raises(Terminated):
        run("""
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a process that ends already
    (path / "ends").touch()
    time.sleep(2.5)
    (path / "saved").touch()
while not (path / "ends").exists():
    time.sleep(0.05)
sys.exit(143)
""")
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("sys.exit(143)", Terminated),
        ("sys.exit(130)", KeyboardInterrupt),
        ("os.kill(os.getpid(), signal.SIGTERM)", Terminated),  # before it could answer
        ("os.kill(os.getpid(), signal.SIGINT)", KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_what_tells_one_process_to_end_is_told_to_all(run, first, end, expected):
    """The other one waits for it, and would do so for ever."""
    with pytest.raises(expected):
        run(f"""
signal.signal(signal.SIGINT, signal.SIG_DFL)
if rank == {first}:
    time.sleep(0.2)
    {end}
time.sleep(60)
""")


def test_the_first_process_is_not_waited_for_by_others_that_hang(run):
    """It alone has anything to save."""
    with pytest.raises(Terminated):
        run("signal.signal(signal.SIGTERM, signal.SIG_IGN); rank or sys.exit(143); time.sleep(60)")


def test_a_second_signal_ends_processes_that_do_not_answer(run, monkeypatch):
    monkeypatch.setattr(launching, "AGAIN_SECONDS", 1.0)
    for wait in (1.0, 1.3):
        threading.Timer(wait, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with pytest.raises(Terminated):
        run("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")


@pytest.mark.parametrize(
    ("end", "said", "code"),
    [
        ("os._exit(3)", "process 1 of the 2 processes ended with exit code 3", 76),
        ("os._exit(137)", "was killed (SIGKILL)", 76),  # a shell in between
        ("os._exit(74)", "ended with exit code 74", 74),
        ("print('cuda says so', file=sys.stderr); os._exit(199)", "cuda says so", 76),
    ],
)
def test_an_end_without_words_is_told_as_far_as_it_is_known(run, end, said, code):
    with pytest.raises(UserError) as error:
        run(f"""
if rank == 1:
    {end}
time.sleep(60)
""")
    assert error.value.code == code
    assert said in error.value.render()


def test_the_process_that_hung_is_named_and_not_the_one_that_nccl_ended(run):
    """Its watchdog ends the process that waits with SIGABRT."""
    words = "[Rank 0] Watchdog caught collective operation timeout; ProcessGroupNCCL's watchdog thread terminated"
    with pytest.raises(UserError, match="process 1 of the 2 processes no longer answered"):
        run(f"""
if rank == 0:
    print({words!r}, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
time.sleep(60)
""")
    with pytest.raises(UserError, match=r"process 0 of the 2 processes was killed \(SIGABRT\)"):
        run("rank or os.kill(os.getpid(), signal.SIGABRT); time.sleep(60)")


@pytest.mark.parametrize(("code", "state"), [(75, "running"), (76, "failed")])
def test_a_run_that_another_command_writes_is_not_called_failed(run, tmp_path, code, state):
    (tmp_path / "result.json").write_text('{"state": "running"}')
    with pytest.raises(UserError):
        run(f"sys.exit({code})")
    assert json.loads((tmp_path / "result.json").read_text())["state"] == state
