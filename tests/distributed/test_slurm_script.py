"""scripts/launch_slurm.sh with stand-ins for SLURM's commands: what it hands on, and when it asks for another turn."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, SMALL
from tests.distributed.two_hosts import shell_environment
from tests.running import result, wait_for_save

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a bash script")

# Each notes what it was asked. srun starts the task and, like the real one, answers its own SIGTERM by killing it.
COMMANDS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        "$@" & task=$!
        trap 'kill -KILL $task' TERM
        echo $task > task
        wait $task""",
    "scancel": '[[ "$*" == "--signal=TERM 7" ]] && kill -TERM "$(<task)"',
    "squeue": "echo $JOB_STATE",
    "scontrol": '[[ $1 == requeue ]] || echo "$HOSTS"',
}
# Stands for the training: ends when it is told to, or at once, and leaves a result.
TASK = """#!/usr/bin/env bash
echo "$NNODES $HEAD $PORT $*" > started
leave() { mkdir -p $RUN; echo "  \\"state\\": \\"$STATE\\"," > $RUN/result.json; exit 1; }
[[ $TOLD == yes ]] || leave
trap leave TERM
touch ready
for _ in {1..600}; do sleep 0.05; done
"""


class Job:
    """A folder with SLURM's commands, and the script as SLURM runs it: a copy, somewhere else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, folder / "notes"
        (folder / "bin").mkdir()
        for name, body in COMMANDS.items():
            command = folder / "bin" / name
            command.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> notes\n{body}\n')
            command.chmod(0o755)
        shutil.copy(ROOT / "scripts" / "launch_slurm.sh", folder / "slurm_script")
        self.process: subprocess.Popen[str]

    def start(self, *words: str, **environment: str) -> None:
        user = shell_environment()
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "1"}
        fake = {"PATH": f"{self.folder / 'bin'}:{user['PATH']}", "JOB_STATE": "RUNNING", "HOSTS": "localhost"}
        self.process = subprocess.Popen(
            [str(self.folder / "slurm_script"), *words],
            cwd=self.folder,
            env=user | slurm | fake | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str]:
        """Its exit code and what was printed."""
        printed, _ = self.process.communicate(timeout=120)
        return self.process.returncode, printed

    def requeued(self) -> int:
        return self.notes.read_text().count("scontrol requeue 7\n")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    if job.process.poll() is None:  # the test failed; torchrun ends its processes when it is told to, and only then
        job.process.terminate()
        job.process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("told", "state", "job_state", "requeued"),
    [
        ("yes", "interrupted", "RUNNING", 1),
        ("yes", "running", "RUNNING", 1),  # it was killed before it could say more
        ("yes", "finished", "RUNNING", 0),
        ("yes", "failed", "RUNNING", 0),
        ("yes", "interrupted", "COMPLETING", 0),
        ("no", "failed", "RUNNING", 0),
        ("no", "interrupted", "RUNNING", 0),
        ("SIGUSR1", "interrupted", "RUNNING", 1),
    ],
)
def test_only_a_run_whose_time_was_up_gets_another_turn(job, told, state, job_state, requeued):
    run = job.folder / "runs" / "slurm-7"
    code, printed = stand_in(job, told, RUN=str(run), STATE=state, JOB_STATE=job_state)
    assert code == 1, printed
    assert state in (run / "result.json").read_text(), "the script did not wait for the training"
    assert job.requeued() == requeued, job.notes.read_text()


def test_every_node_gets_the_head_the_words_and_the_name(job):
    words = ("name=pets", "runs_dir=out", "trainer.max_epochs=3")
    slurm = {"SLURM_JOB_NUM_NODES": "2", "HOSTS": "node1\nnode2", "SLURM_GPUS_ON_NODE": "4"}
    stand_in(job, "yes", *words, **slurm, RUN="out/pets", STATE="failed")
    started = (job.folder / "started").read_text().split()
    assert started == ["2", "node1", "20007", "trainer.devices=4", *words, "name=pets"]
    assert job.requeued() == 0, "the result of the run was not found"


def stand_in(job: Job, told: str, *words: str, **environment: str) -> tuple[int, str]:
    """A job with TASK in the place of the training; told: "yes" for a SIGTERM, another signal's name, "no"."""
    (job.folder / "scripts").mkdir()
    task = job.folder / "scripts" / "launch_torchrun.sh"
    task.write_text(TASK)
    task.chmod(0o755)
    job.start(*words, TOLD="no" if told == "no" else "yes", **environment)
    if told != "no":
        while not (job.folder / "ready").exists() and job.process.poll() is None:
            time.sleep(0.01)
        job.process.send_signal(signal.SIGTERM if told == "yes" else signal.Signals[told])
    return job.end()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_a_training_that_is_told_to_end_continues_in_its_next_turn(job):
    (job.folder / "scripts").symlink_to(ROOT / "scripts")
    run = job.folder / "runs" / "slurm-7"
    words = (*SMALL, "strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.image_size=32")
    words = (*words, "trainer.max_epochs=8", "memory.log=false", "checkpoint.every_n_steps=1")
    job.start(*words)
    assert wait_for_save(run, 2, job.process), job.end()[1]
    job.process.send_signal(signal.SIGTERM)
    code, printed = job.end()
    assert code != 0
    assert "the position is in runs/slurm-7/checkpoints/last.ckpt" in printed
    assert result(run)["state"] == "interrupted"
    assert job.requeued() == 1

    job.start(*words)
    code, printed = job.end()
    assert code == 0, printed
    assert "continuing from runs/slurm-7/checkpoints/last.ckpt" in printed
    assert (result(run)["state"], result(run)["epochs"]) == ("finished", 8)
    assert job.requeued() == 1
