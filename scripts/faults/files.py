"""Files that are damaged, left over or cannot be written."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.faults.injecting import STEP, WRITE, Fault, kill
from scripts.faults.programs import Program, check
from scripts.faults.project import Project
from scripts.faults.registry import Guard, Impossible, row
from scripts.faults.signals import wait_for

NO_CHECKSUM = (Fault("src.engine.runs.checksum:damage", "answer", to=0),)


@contextmanager
def small_disk(folder: Path, mib: float) -> Iterator[None]:
    """Mounts a file system of this size on the folder. Raises Impossible without the right to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={int(mib * 2**20)}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise Impossible(f"mount: {done.stderr.strip()}")


@row(
    7,
    "orphan_sweep",
    promise="the run's own leftovers are removed at its start, nobody else's",
    injection="SIGKILL in a write; beside the leftover lie a user's notes.tmp and a file of a live process",
    quick=True,
    plain=False,
)
def orphan_sweep(program: Project) -> str:
    program.check_killed(program.train(Fault(WRITE, "half written", nth=3)))
    others = [program.path() / "notes.tmp", program.checkpoints() / f"last.ckpt.{os.getpid()}.tmp"]
    for file in others:
        file.write_text("mine")
    left = [file for file in program.path().rglob("*.tmp") if file not in others]
    program.check_continues_exactly()
    check(all(file.exists() for file in others), "a file of somebody else was deleted")
    check(not any(file.exists() for file in left), "a leftover is still there")
    check(left, "the kill left nothing: the row shows nothing")
    return f"{len(left)} leftover removed, 2 files of others kept"


def killed_with_two_positions(program: Program, run: str) -> Path:
    """Newest checkpoint of a run that was killed in step 12."""
    if not (program.folder / "killed").exists():
        program.check_killed(program.train(kill(STEP, 12), run="original", save_every=2))
        shutil.copytree(program.path("original"), program.folder / "killed")
    shutil.copytree(program.folder / "killed", program.path(run))
    return program.checkpoints(run) / "last.ckpt"


@row(
    8,
    "truncated_fallback",
    promise="the one before is used, and the log says so; exact",
    injection="the newest checkpoint cut to 50 %, to 99 %, to nothing",
    guard=Guard("the checksum", NO_CHECKSUM),
)
def truncated_fallback(program: Program) -> str:
    for share in (0.5, 0.99, 0):
        last = killed_with_two_positions(program, run := f"cut{share}")
        os.truncate(last, int(last.stat().st_size * share))
        check_falls_back(program, run)
    return "previous.ckpt is taken, last.ckpt named, result equal by SHA-256"


def check_falls_back(program: Program, run: str) -> None:
    done = program.check_continues_exactly(run=run, save_every=2)
    if isinstance(program, Project):
        check("last.ckpt is damaged" in done.out, "the damaged file is not named")
        check(f"continuing from runs/{run}/checkpoints/previous.ckpt" in done.out, "the file that is used is not named")


@row(
    9,
    "bitflip_fallback",
    promise="the checksum notices, the one before is used; exact",
    injection="one bit of a weight in the newest checkpoint flipped",
    quick=True,
    guard=Guard("the checksum", NO_CHECKSUM),
)
def bitflip_fallback(program: Program) -> str:
    last = killed_with_two_positions(program, "flipped")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 64
    last.write_bytes(content)
    check_falls_back(program, "flipped")
    return "named, and equal by SHA-256"


@row(
    10,
    "all_corrupt",
    promise="an exit code of its own (74 here), never a start from nothing",
    injection="every checkpoint damaged",
    quick=True,
)
def all_corrupt(program: Program) -> str:
    killed_with_two_positions(program, "spoilt")
    for file in program.checkpoints("spoilt").glob("*.ckpt"):
        os.truncate(file, 1000)
    before = sorted(file.name for file in program.path("spoilt").rglob("*.csv"))
    done = program.train(run="spoilt", save_every=2)
    check(done.code != 0, "it trained from nothing, exit code 0")
    if isinstance(program, Project):
        program.check_error(done, 74, "no checkpoint of this run can be read", "last.ckpt", "previous.ckpt")
    check(before == sorted(file.name for file in program.path("spoilt").rglob("*.csv")), "it began to train")
    check(any(name in done.text for name in ("last.ckpt", "spoilt")), f"no file is named; {done.end()}")
    return "exit code 74, both files named" if isinstance(program, Project) else done.end()


@row(
    11,
    "last_is_last",
    promise="the last checkpoint is of the last step",
    injection="a metric that never improves (a learning rate of 1e-12)",
)
def last_is_last(program: Program) -> str:
    done = program.train(lr=1e-12)
    check(done.code == 0, done.end())
    expected = 3 * (5 if isinstance(program, Project) else -(-36 // 8))
    steps = program.steps_of_last()
    check(steps == expected, f"last.ckpt is of step {steps} of {expected}")
    return f"step {steps} of {expected}"


@row(
    12,
    "disk_full_ckpt",
    promise="training goes on, the old checkpoint stays, a warning; after making room the result is exact",
    injection="the run's folder on a disk with room for little more than a checkpoint, full from step 7 on",
)
def disk_full_ckpt(program: Program) -> str:
    with small_disk(program.folder / "runs", 7 if isinstance(program, Project) else 1.2):
        filler = program.folder / "runs" / "filler"
        done = program.train(fill_disk_at(7, filler), save_every=2)
        return check_no_room(program, done, make_room=lambda: _mount("-o", "remount,size=64m", str(filler.parent)))


def fill_disk_at(step: int, filler: Path) -> Fault:
    return Fault(STEP, "fill disk", str(filler), nth=step)


def check_no_room(program: Program, done, make_room, save_every: int = 2) -> str:
    check(done.code not in (0, None), f"it says that all is well; {done.end()}")
    if isinstance(program, Project):
        check(done.code == 73, f"expected exit code 73; {done.end()}")
        check(len(done.err.strip().splitlines()) <= 15, "the message does not fit a screen")
        check("could not be written" in done.text, "no warning names the checkpoint")
    check(program.trained_to_the_end(done), f"training did not go on; {done.end()}")
    make_room()
    program.check_continues_exactly(save_every=save_every)
    return "trained on with warnings, exit code 73, then exact"


@row(
    13,
    "tmp_full",
    promise="saves succeed",
    injection="a temp folder without room, the run's disk free",
)
def tmp_full(program: Program) -> str:
    with small_disk(program.folder / "tmp", 0.1):
        (program.folder / "tmp" / "filler").write_bytes(bytes(90_000))
        program.check_continues_exactly(environ={"TMPDIR": str(program.folder / "tmp")}, like={})
    return "equal by SHA-256"


@row(
    14,
    "quota",
    promise="as row 12",
    injection="RLIMIT_FSIZE: no file may be as large as a checkpoint; in another run none as the weights alone",
    quick=True,
)
def quota(program: Program) -> str:
    if isinstance(program, Project):  # best.ckpt and model/ fit, and no position does
        done = program.train(run="weights", file_limit=2_200_000)
        check(done.code == 0 and "last.ckpt could not be written" in done.text, f"no warning; {done.end()}")
        weights = program.path("weights") / "model" / "model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        check(digest == program.undisturbed()[weights.name], "not the undisturbed weights")
    done = program.train(file_limit=1_200_000 if isinstance(program, Project) else 400_000, save_every=2)
    return check_no_room(program, done, make_room=lambda: None)


@row(
    15,
    "readonly_out",
    promise="ends before the first step, with an exit code of its own (73 here)",
    injection="a disk that is read-only from the start, and one that becomes so before the run goes on",
)
def readonly_out(program: Program) -> str:
    with small_disk(program.folder / "runs", 64):
        _mount("-o", "remount,ro", str(program.folder / "runs"))
        check_refused(program, program.train())
        _mount("-o", "remount,rw", str(program.folder / "runs"))
        program.check_killed(program.train(kill(STEP, 8), save_every=2))
        _mount("-o", "remount,ro", str(program.folder / "runs"))
        check_refused(program, program.train(kill(STEP), save_every=2))
        _mount("-o", "remount,rw", str(program.folder / "runs"))
        if isinstance(program, Project):
            program.check_continues_exactly(save_every=2)
    return "73 before the first step, both times; writable again: exact"


def check_refused(program: Program, done) -> None:
    check(done.code not in (0, None, -9), f"not refused before the first step; {done.end()}")
    if isinstance(program, Project):
        program.check_error(done, 73, "runs")


@row(
    44,
    "two_writers",
    promise="the second is refused, the first ends as if it had been alone",
    injection="the same command a second time while the first trains",
    quick=True,
    guard=Guard("the lock", (Fault("fcntl:flock", "answer", to=0),)),
)
def two_writers(program: Program) -> str:
    there = program.folder / "there"
    first = program.start(Fault(STEP, "meet", str(there), nth=8))
    wait_for(there, first)
    second = program.train()
    there.unlink()
    done = program.finish(first)
    check(second.code not in (0, None), "both write the same files")
    if isinstance(program, Project):
        program.check_error(second, 75, "another process is writing")
        check(not (program.path() / "error.log").exists(), "the second wrote error.log into the folder of the first")
    check(done.code == 0, f"the first fails; {done.end()}")
    program.check_exact()
    return "exit code 75; the first equal by SHA-256"


@row(
    45,
    "same_second",
    promise="each has a folder of its own",
    injection="two commands without a name at once",
    plain=False,
)
def same_second(program: Program) -> str:
    words = [word for word in program.words("run", epochs=1) if not word.startswith("name=")]
    both = [program.start_command(program.module, *words) for _ in range(2)]
    ended = [program.finish(process) for process in both]
    check(all(done.code == 0 for done in ended), " / ".join(done.end() for done in ended))
    runs = [path for path in (program.folder / "runs").iterdir() if (path / "result.json").exists()]
    check(len(runs) == 2, f"{len(runs)} folders")
    return "two folders, both finished"
