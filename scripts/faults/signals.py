"""SIGTERM, SIGINT and SIGUSR1: the position is saved, the exit code says why, and the run resumes exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

from scripts.faults.injecting import CHILDREN, STEP, VALIDATION_STEP, WRITE, Fault, armed, send, slow
from scripts.faults.programs import Done, Program, check, on_this_machine
from scripts.faults.project import Project
from scripts.faults.registry import row
from tests import warm

FIT = "lightning.pytorch.trainer.trainer:Trainer.fit"


def check_stopped(program: Program, done: Done, code: int, step: int | None = None, run: str = "run") -> None:
    """The command ended with this code and saved the position after this step."""
    check(done.code == code, f"expected exit code {code}; {done.end()}")
    if step is not None:
        last = program.checkpoints(run) / "last.ckpt"
        check(last.exists(), "no position was saved")
        check(program.steps_of_last(run) == step, f"step {step} was done, step {program.steps_of_last(run)} is saved")


@row(
    16,
    "sigterm_save",
    promise="saved and gone within 5 s, exit code 143, exact",
    injection="SIGTERM from outside in step 8; to itself in validation, and before the first step",
    quick=True,
)
def sigterm_save(program: Program) -> str:
    seconds = signal_from_outside(program, "outside", signal.SIGTERM, 143)
    check(seconds <= on_this_machine(5), f"it took {seconds:.1f} s to end")
    check(program.steps_of_last("outside") == 8, f"step 8 was done, step {program.steps_of_last('outside')} is saved")
    program.check_continues_exactly(run="outside")
    done = program.train(send(signal.SIGTERM, VALIDATION_STEP, program.validation_of_epoch_2), run="validation")
    check_stopped(program, done, 143, run="validation")
    program.check_continues_exactly(run="validation")
    check_stopped(program, program.train(send(signal.SIGTERM, FIT), run="start"), 143, run="start")
    program.check_continues_exactly(run="start")
    return f"gone after {seconds:.1f} s, 143 each time, equal by SHA-256"


def signal_from_outside(program: Program, run: str, number: int, code: int, **settings) -> float:
    """Sends the signal in step 8; returns the seconds until the training has ended."""
    there = program.folder / "there"
    process = program.start(Fault(STEP, "meet", str(there), nth=8), run=run, **settings)
    wait_for(there, process)
    began = time.monotonic()
    process.send_signal(number)
    there.unlink()
    done = program.finish(process, seconds=30)
    check(done.code == code, f"expected exit code {code}; {done.end()}")
    return time.monotonic() - began


def wait_for(file: Path, process) -> None:
    while not file.exists():
        check(process.poll() is None, f"it ended before the fault; exit code {process.returncode}")
        time.sleep(0.02)


@row(
    18,
    "double_sigterm",
    promise="the save is completed, exit code 143, exact",
    injection="SIGTERM in step 8; a second one while the checkpoint is written, which takes 1.5 s",
    quick=True,
)
def double_sigterm(program: Program) -> str:
    twice = [send(signal.SIGTERM, STEP, 8), send(signal.SIGTERM, WRITE, 3), slow(WRITE, 1.5, 3)]
    check_stopped(program, program.train(*twice), 143, step=8)
    program.check_continues_exactly()
    return "step 8 is saved, 143, equal by SHA-256"


@row(19, "ctrl_c", promise="saved, exit code 130, exact", injection="SIGINT from outside in step 8")
def ctrl_c(program: Program) -> str:
    signal_from_outside(program, "run", signal.SIGINT, 130)
    check(program.steps_of_last() == 8, f"step 8 was done, step {program.steps_of_last()} is saved")
    program.check_continues_exactly()
    return "step 8 is saved, 130, equal by SHA-256"


@row(
    17,
    "sigusr1_requeue",
    promise="saved, requeued once, exact",
    injection="SIGUSR1 in step 8; then SLURM's signal to scripts/launch_slurm.sh, with a scontrol that notes its calls",
)
def sigusr1_requeue(program: Program) -> str:
    slurm = Slurm(program.folder)
    if isinstance(program, Project):
        signal_from_outside(program, "told", signal.SIGUSR1, 143)
        check(program.steps_of_last("told") == 8, f"step {program.steps_of_last('told')} of 8 is saved")
        program.check_continues_exactly(run="told")
    there = program.folder / "there"
    fault = armed([Fault(STEP, "meet", str(there), nth=8)], slurm.environment)
    job = slurm.start(program, fault)
    wait_for(there, job)
    job.send_signal(signal.SIGTERM if isinstance(program, Project) else signal.SIGUSR1)
    time.sleep(0.5)
    there.unlink()
    done = program.finish(job, 60)
    check(slurm.requeued() == 1, f"requeued {slurm.requeued()} times; {done.end()}")
    again = program.finish(slurm.start(program, armed([], slurm.environment)), 60)
    check(again.code == 0, f"the next turn: {again.end()}")
    program.check_exact()
    check(slurm.requeued() == 1, "requeued again after the end")
    return "SIGUSR1: saved, 143; the job: requeued once, its next turn equal by SHA-256"


class Slurm:
    """Stand-ins for SLURM's commands that log their calls. Like the real one, srun kills its task on SIGTERM."""

    COMMANDS: ClassVar = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\n"$@" & task=$!\ntrap "kill -KILL $task" TERM\n'
        "echo $task > task\nwait $task",
        "scancel": '[[ "$*" == "--signal=TERM 7" ]] && kill -TERM "$(<task)"',
        "squeue": "echo RUNNING",
        "scontrol": "[[ $1 == requeue ]] || echo localhost",
    }

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, body in self.COMMANDS.items():
            command = folder / "bin" / name
            command.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/notes\n{body}\n')
            command.chmod(0o755)
        (folder / "scripts").symlink_to(warm.ROOT / "scripts")
        (folder / "notes").touch()
        self.environment = {
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"},
            **{"SLURM_JOB_NAME": "train", "SLURM_LOCALID": "0", "SLURM_PROCID": "0", "SLURM_NODEID": "0"},
        }

    def start(self, program: Program, fault: dict[str, str]) -> subprocess.Popen[str]:
        """The job: the project's script, or the plain program as SLURM would start it."""
        if not isinstance(program, Project):
            return program.start_command(program.module, *program.words("run"), environment=fault)
        return subprocess.Popen(
            ["scripts/launch_slurm.sh", "strategy=single", *program.words("run")],
            cwd=self.folder,
            env=warm.command_environment() | self.environment | fault | {"PYTHONPATH": f"{CHILDREN}:{warm.ROOT}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def requeued(self) -> int:
        return (self.folder / "notes").read_text().count("scontrol requeue 7")
