"""Faults in the trials or the driver of a Ray Tune sweep."""

from __future__ import annotations

import hashlib
import json
import time

from scripts.faults.injecting import STEP, Fault, kill
from scripts.faults.programs import Done, check
from scripts.faults.project import Project
from scripts.faults.registry import row

LAUNCHER = ("-m", "hydra/launcher=ray_tune", "optimizer.lr=0.001,0.01")
EPOCHS = 6


def sweep(project: Project, *faults: Fault, words: tuple[str, ...] = (), seconds: float = 200) -> Done:
    return project.train(*faults, run="sweep", epochs=EPOCHS, words=(*LAUNCHER, *words), seconds=seconds)


def rows(project: Project, trial: int | None = None) -> int:
    """Number of epochs that the trials have reported."""
    file = project.path("sweep") / "trials.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return sum(event["event"] == "row" and trial in (None, event["trial"]) for event in events)


def check_trials(project: Project) -> None:
    """Both trials finished with the same weights as these runs outside a sweep."""
    for number, rate in enumerate((0.001, 0.01)):
        run = project.path("sweep") / str(number)
        check(json.loads((run / "result.json").read_text())["state"] == "finished", f"trial {number} has not finished")
        weights = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
        whole = project.undisturbed(epochs=EPOCHS, lr=rate)
        check(weights == whole["model.safetensors"], f"trial {number} has other weights than an undisturbed run")


@row(
    46,
    "ray_worker",
    promise="retried from its checkpoint, exact; a sweep with a failed trial does not exit with 0",
    injection="SIGKILL to a trial in its second epoch; in another sweep to every try of every trial",
    plain=False,
)
def ray_worker(project: Project) -> str:
    done = sweep(project, kill(STEP, 8, once=str(project.folder / "happened")))
    check((project.folder / "happened").exists(), f"the fault did not happen; {done.end()}")
    check(done.code == 0, f"the sweep failed; {done.end()}")
    check_trials(project)
    again = project.train(kill(STEP, 8), run="lost", words=(*LAUNCHER, "hydra.launcher.max_failures=0"), seconds=200)
    check(again.code == 1, f"all trials were killed; {again.end()}")
    return "went on from its checkpoint, equal by SHA-256; the other sweep: exit code 1"


@row(
    47,
    "ray_driver",
    promise="the repeated command loses at most one epoch of each trial, exact",
    injection="SIGKILL to the command after five epochs",
    plain=False,
)
def ray_driver(project: Project) -> str:
    process = project.start(run="sweep", epochs=EPOCHS, words=LAUNCHER)
    while rows(project) < 5:
        check(process.poll() is None, "the sweep ended before the fault")
        time.sleep(0.05)
    process.kill()
    process.communicate()
    project.check_nobody_left(10, named=b"Trainable")  # two small ones of Ray's own wait for a minute
    done = sweep(project)
    check(done.code == 0, f"the repeated command failed; {done.end()}")
    check_trials(project)
    repeated = [rows(project, number) - EPOCHS for number in (0, 1)]
    check(max(repeated) <= 1, f"epochs that were trained again: {repeated}")
    return f"{sum(repeated)} epochs trained again, equal by SHA-256"


@row(
    48,
    "sweep_one_fails",
    promise="the others finish, the summary lists the one that failed, exit code 1",
    injection="an exception in one of two trials",
    plain=False,
)
def sweep_one_fails(project: Project) -> str:
    fault = Fault(STEP, "raise", "this trial cannot be trained", nth=8, once=str(project.folder / "happened"))
    done = sweep(project, fault)
    check(done.code == 1, f"expected exit code 1; {done.end()}")
    check("this trial cannot be trained" in done.text, "its error is not listed")
    states = [
        json.loads((project.path("sweep") / number / "result.json").read_text())["state"] for number in ("0", "1")
    ]
    check(sorted(states) == ["failed", "finished"], f"the trials: {', '.join(states)}")
    return "one finished, one listed with its error, exit code 1"
