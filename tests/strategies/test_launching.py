"""Starting and watching processes, with small programs in the place of trainings: which failure is the one that is told."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.backends.cpu import get_cpu_capability

from src import config_checks
from src.errors import ErrorOfProcess, Terminated, UserError
from src.strategies import launching
from src.user_command import shell_command

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
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRAIN_COMMAND")
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
    assert both[0][2]["MASTER_PORT"] == both[1][2]["MASTER_PORT"]


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
print("some library's noise\\nERROR   bad picture  (exit code 65)\\nwhy     it is", file=sys.stderr)
sys.exit(65)
""")
    assert error.value.code == 65
    assert error.value.render() == "ERROR   bad picture  (exit code 65)\nwhy     it is"


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
        run("rank == 0 and (time.sleep(2.5), (path / 'saved').touch()); sys.exit(143)")
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("code", "state"), [(75, "running"), (76, "failed")])
def test_a_run_that_another_command_writes_is_not_called_failed(run, tmp_path, code, state):
    (tmp_path / "result.json").write_text('{"state": "running"}')
    with pytest.raises(UserError):
        run(f"sys.exit({code})")
    assert json.loads((tmp_path / "result.json").read_text())["state"] == state
