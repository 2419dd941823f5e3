"""Ranks that get a signal, die, raise, hang, or are fewer after a restart; loader processes that die or hang."""

from __future__ import annotations

import signal
import time

from scripts.faults.injecting import FETCH, OPEN_IMAGE, STEP, Fault, kill, little_memory, send, slow
from scripts.faults.programs import Done, Program, check, on_this_machine, weights_of
from scripts.faults.project import Project
from scripts.faults.registry import Impossible, row

RANKS = {"devices": 2, "save_every": 2}


def ended_after(program: Program, *faults: Fault, seconds: float, **settings) -> Done:
    """A run with a fault; fails unless all its processes end within so many seconds."""
    marker = program.folder / f"happened-{settings.get('run', 'run')}"
    first, *others = [Fault(**{**vars(fault), "once": str(marker)}) for fault in faults]
    done = program.train(first, *others, **settings)
    ended = time.time()
    if not marker.exists() and not isinstance(program, Project):
        raise Impossible("the fault did not happen: on a busy machine its processes meet too late")
    check(marker.exists(), f"the fault did not happen; {done.end()}")
    program.check_nobody_left(seconds)
    check(done.code is not None, "it hangs")
    took = ended - marker.stat().st_mtime
    check(took <= on_this_machine(seconds), f"it took {took:.0f} s to end")
    return done


@row(
    20,
    "sigterm_any_rank",
    promise="all end within 10 s, exit code 143, one checkpoint, exact",
    injection="SIGTERM to rank 1 of 2 in step 8",
)
def sigterm_any_rank(program: Program) -> str:
    done = ended_after(program, send(signal.SIGTERM, STEP, 8, rank=1), seconds=10, **RANKS)
    check(done.code == 143, f"expected exit code 143; {done.end()}")
    program.check_continues_exactly(**RANKS)
    return "both stopped at one step, 143, equal by SHA-256"


@row(
    21,
    "rank_killed",
    promise="all are gone within 15 s, the rank is named, exact",
    injection="SIGKILL to rank 1 of 2; in another run to rank 0",
)
def rank_killed(program: Program) -> str:
    for rank in (1, 0):
        run = f"rank{rank}"
        done = ended_after(program, kill(STEP, 8, rank=rank), seconds=15, run=run, **RANKS)
        check(f"process {rank}" in done.text or f"rank {rank}" in done.text, f"the rank is not named; {done.end()}")
        if isinstance(program, Project):
            program.check_error(done, 76, f"process {rank} of the 2 processes was killed (SIGKILL)")
    program.check_continues_exactly(run="rank1", **RANKS)
    return "named, exit code 76, nobody left, equal by SHA-256"


@row(
    22,
    "rank_exception",
    promise="its own error is the one that is printed, with the rank",
    injection="an exception in rank 1 of 2",
)
def rank_exception(program: Program) -> str:
    fault = Fault(STEP, "raise", "the disk of this process is gone", nth=8, rank=1)
    done = ended_after(program, fault, seconds=15, **RANKS)
    check(done.code not in (0, None), f"it says that all is well; {done.end()}")
    check("the disk of this process is gone" in done.err, f"the error is not printed; {done.end()}")
    if isinstance(program, Project):
        check(done.err.count("ERROR ") == 1, "more than one error is printed")
        check("process 1" in done.err or "rank 1" in done.err, "the rank is not named")
    else:
        check("rank 1" in done.err.lower() or "process 1" in done.err.lower(), "the rank is not named")
    return "the first and only error printed, the rank named"


@row(
    23,
    "slow_rank",
    promise="the rank is named, no process is left",
    injection="rank 1 sleeps 60 s in a step, the others wait for 10 s",
)
def slow_rank(program: Program) -> str:
    done = ended_after(program, slow(STEP, 60, 8, to=None, rank=1), seconds=30, timeout_seconds=10, **RANKS)
    check("process 1" in done.text or "rank 1" in done.text, f"the rank is not named; {done.end()}")
    if isinstance(program, Project):
        program.check_error(done, 76, "process 1 of the 2 processes no longer answered")
    return "named, exit code 76, nobody left"


@row(
    24,
    "restart_resumes",
    promise="goes on by itself, exact",
    injection="rank 1 killed once under torchrun --max-restarts 1",
)
def restart_resumes(program: Program) -> str:
    from scripts.faults.injecting import armed

    words = program.words("run", **RANKS)
    fault = kill(STEP, 8, rank=1, once=str(program.folder / "happened"))
    launch = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", program.module, *words]
    done = program.command("torch.distributed.run", *launch, environment=armed([fault]), seconds=100)
    check((program.folder / "happened").exists(), f"the fault did not happen; {done.end()}")
    check(done.code == 0, f"the restart did not finish; {done.end()}")
    program.check_exact(**RANKS)
    return "one command, equal by SHA-256"


@row(
    25,
    "world_change",
    promise="the same order of images; weights within 1e-5 of those of one process",
    injection="2 ranks killed in step 8, the same run continued by 1",
)
def world_change(program: Program) -> str:
    one = {"save_every": 1, "keep_batchnorm": True}
    program.train(kill(STEP, 8, rank=0), **one, devices=2)
    done = program.train(**one)
    check(done.code == 0, f"one process cannot go on; {done.end()}")
    program.undisturbed(**one)
    difference = distance(program, "run", **one)
    check(difference <= 1e-5, f"weights differ by {difference:.0e}")
    return f"weights differ by {difference:.0e}"


def distance(program: Program, run: str, **settings) -> float:
    """The largest difference of a weight from the undisturbed run."""
    program.undisturbed(**settings)
    whole = weights_of(program.undisturbed_folder(**settings) / "last.ckpt")
    return (weights_of(program.checkpoints(run) / "last.ckpt") - whole).abs().max().item()


@row(
    30,
    "oom_one_rank",
    promise="both ranks take smaller parts, no hang; weights within 1e-5",
    injection="out-of-memory in rank 1 of 2 with more than 2 of its 4 images",
)
def oom_one_rank(program: Program) -> str:
    settings = {"devices": 2, "keep_batchnorm": True}
    done = program.train(little_memory(2, rank=1), seconds=60, **settings)
    check(done.code == 0, f"not finished; {done.end()}")
    difference = distance(program, "run", **settings)
    check(difference <= 1e-5, f"weights differ by {difference:.0e}")
    return f"finished, weights differ by {difference:.0e}"


@row(
    31,
    "worker_killed",
    promise="the loader process and its likely cause are named, the position is saved; exact",
    injection="SIGKILL to one of 2 loader processes in the second epoch",
    quick=True,
)
def worker_killed(program: Program) -> str:
    marker, last = program.folder / "happened", program.checkpoints() / "last.ckpt"
    fault = kill(FETCH, 3, loader=True, once=str(marker), since=str(last))  # asked for after the epoch's first step
    done = program.train(fault, workers=2, seconds=60)
    check(marker.exists(), f"the fault did not happen; {done.end()}")
    check(done.code not in (0, None), f"it says that all is well; {done.end()}")
    if isinstance(program, Project):
        check(done.code != 70, f"it calls that a defect of the program; {done.end()}")
        check(len(done.err.strip().splitlines()) <= 15, "the message does not fit a screen")
    named = "loader" in done.err.lower() and ("killed" in done.err.lower() or "SIGKILL" in done.err)
    check(named, f"not named; {done.end()}")
    check(program.steps_of_last() > 5, "the steps of its epoch are lost")
    program.check_continues_exactly(workers=2)
    return f"named, exit code {done.code}, saved, equal by SHA-256"


@row(
    32,
    "worker_hang",
    promise="a time limit ends it and names the image; SIGTERM is answered",
    injection="an image whose reading never ends, in a loader process and in the program itself",
    quick=True,
)
def worker_hang(program: Program) -> str:
    limit = ("data.timeout_seconds=3",)
    for workers in (2, 0):
        marker = program.folder / f"happened{workers}"
        hang = slow(OPEN_IMAGE, 600, 5, to=None, inside="__getitem__", loader=workers > 0, once=str(marker))
        done = program.train(hang, run=f"workers{workers}", workers=workers, seconds=25, words=limit)
        check(marker.exists(), "the fault did not happen")
        check(done.code is not None, "it hangs")
        check(".png" in done.err, f"the image is not named; {done.end()}")
    return "ended and named, with and without loader processes"
