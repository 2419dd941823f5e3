"""kill -9 at any moment: the repeated command ends with the same bits as an undisturbed run."""

from __future__ import annotations

import random
from pathlib import Path

from scripts.faults.injecting import COPY, SAVE, STEP, VALIDATION_STEP, WRITE, Fault, kill, slow
from scripts.faults.programs import Program, check, tensors_of
from scripts.faults.project import Project
from scripts.faults.registry import Guard, row

KILLS = 20  # of row 4; --kills


@row(
    1,
    "kill_mid_epoch",
    promise="exact, with 0 and with 2 loader processes",
    injection="SIGKILL in step 8, amid the second epoch",
    quick=True,
)
def kill_mid_epoch(program: Program) -> str:
    for workers in (0, 2):
        run = f"workers{workers}"
        program.check_killed(program.train(kill(STEP, 8), run=run, workers=workers, save_every=2))
        program.check_continues_exactly(run=run, workers=workers, save_every=2)
    return "weights, optimizer, split and confusion matrix equal by SHA-256"


@row(
    2,
    "kill_epoch_end",
    promise="exact",
    injection="SIGKILL after the save at an epoch's end is asked for, and in the first step of the next epoch",
)
def kill_epoch_end(program: Program) -> str:
    moments = {"save": kill(SAVE, 2, after=True), "next": kill(STEP, 11)}
    for run, fault in moments.items():
        program.check_killed(program.train(fault, run=run))
        program.check_continues_exactly(run=run)
    return "equal by SHA-256 after both"


@row(3, "kill_in_validation", promise="exact", injection="SIGKILL in the validation of the second epoch")
def kill_in_validation(program: Program) -> str:
    program.check_killed(program.train(kill(VALIDATION_STEP, program.validation_of_epoch_2)))
    program.check_continues_exactly()
    return "equal by SHA-256"


@row(
    4,
    "kill_random",
    promise="exact, and finishes",
    injection="SIGKILL at random instants, the command repeated until it is done",
)
def kill_random(program: Program) -> str:
    instants, kills, runs = random.Random(4), 0, 0
    while kills < KILLS:
        # Every other run averages its best two epochs, which needs the files of both.
        words = ("checkpoint.select=average_top_k", "checkpoint.top_k=2") if runs % 2 else ()
        settings = {"save_every": 1, "epochs": 6, "words": words}
        program.undisturbed(**settings)
        whole = program.train(run=f"whole{runs}", **settings).seconds
        for attempt in range(60):
            seconds = whole * instants.uniform(0.2, 1.0) * (1 + attempt / 20)
            done = program.train(run=f"run{runs}", seconds=seconds, **settings)
            if done.code is not None:
                break
            kills += 1
        check(done.code == 0, f"not finished after {kills} kills in {runs + 1} runs; {done.end()}")
        check("cannot be read" not in done.text, f"a file was lost; {done.end()}")
        program.check_exact(f"run{runs}", **settings)
        runs += 1
    return f"{kills} kills in {runs} runs, each equal by SHA-256"


@row(
    5,
    "kill_in_save",
    promise="every checkpoint that is there loads; exact",
    injection="SIGKILL when half of a checkpoint's bytes are written, with the temp folder on another disk",
    quick=True,
    guard=Guard("the atomic write", (Fault("src.engine.runs.files:write_atomically", "write in place", to=0),)),
)
def kill_in_save(program: Program) -> str:
    other_disk = {"TMPDIR": "/dev/shm"}
    for nth in (3, 4, 5):
        run, halves = f"run{nth}", [Fault(where, f"half {done}", nth=nth) for where, done in HALVES.items()]
        program.check_killed(program.train(*halves, run=run, save_every=2, environ=other_disk))
        check_all_load(program.checkpoints(run))
        cut = [*program.checkpoints(run).glob("*.tmp")]
        check(cut or not isinstance(program, Project), "it was not killed while it wrote: the row shows nothing")
        program.check_continues_exactly(run=run, save_every=2)
    return "killed in 3 writes: each time the old file or the new one, and exact"


HALVES = {WRITE: "written", COPY: "copied"}


def check_all_load(folder: Path) -> None:
    """There is a checkpoint, and each one loads."""
    files = [*folder.glob("*.ckpt")]
    check(files, "there is no checkpoint")
    for file in files:
        try:
            tensors_of(file)
        except RuntimeError as error:
            raise AssertionError(f"{file.name} cannot be loaded: {error}") from error


@row(
    6,
    "kill_between_saves",
    promise="a position never refers to a file that is not there; the best epochs are right",
    injection="SIGKILL before the third, fourth and fifth file, on a disk that takes a second for each",
)
def kill_between_saves(program: Program) -> str:
    average = ("checkpoint.select=average_top_k", "checkpoint.top_k=2")
    for words in ((), average):
        for nth in (3, 4, 5):
            run, settings = f"{'average' if words else 'best'}{nth}", {"save_every": 1, "words": words}
            slow_disk = [kill(WRITE, nth), slow(WRITE, 1.0), slow(STEP, 0.3)]
            program.check_killed(program.train(*slow_disk, run=run, **settings))
            done = program.check_continues_exactly(run=run, **settings)
            check("cannot be read" not in done.text, "files of the best epochs are missing")
    return "exact with select=best and with average_top_k, killed at three files each"
