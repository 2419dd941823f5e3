"""NaN, infinity, and too little memory."""

from __future__ import annotations

import math

import torch

from scripts.faults.injecting import LOSS, Fault, little_memory
from scripts.faults.processes import distance
from scripts.faults.programs import Program, check
from scripts.faults.project import Project
from scripts.faults.registry import Guard, row


def check_finite(program: Program, run: str) -> None:
    """Every checkpoint holds finite numbers only."""
    files = [*program.checkpoints(run).glob("*.ckpt")]
    check(files, "there is no checkpoint")
    for file in files:
        state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        check(all(tensor.isfinite().all() for tensor in state.values()), f"{file.name} is full of nan")


def check_policies(program: Program, fault: Fault) -> str:
    """stop ends with its own exit code and names step and images; skip and restore train on."""
    done = program.train(fault, run="stop")
    check_finite(program, "stop")
    check(done.code != 0, "nobody noticed, exit code 0")
    if isinstance(program, Project):
        program.check_error(done, 77, "step 8", ".png")
    program.check_continues_exactly(run="stop")
    if isinstance(program, Project):
        for policy in ("skip", "restore"):
            words = (f"trainer.on_nan={policy}",)
            done = program.train(fault, run=policy, words=words)
            check(done.code == 0, f"trainer.on_nan={policy}: {done.end()}")
            check("step 8" in done.text, f"trainer.on_nan={policy}: the step is not named")
            check_finite(program, policy)
            numbers = program.result(policy)["metrics"].values()
            check(all(math.isfinite(number) for number in numbers), f"trainer.on_nan={policy}: the metrics are nan")
    return "stop: exit code 77, step and images named, exact after it; skip and restore: finished, all finite"


@row(
    26,
    "nan_loss",
    promise="stopped, skipped or restored, as trainer.on_nan says; the last good weights are kept",
    injection="the loss of step 8 is nan",
    quick=True,
)
def nan_loss(program: Program) -> str:
    return check_policies(program, Fault(LOSS, "multiply", math.nan, nth=8, training=True))


@row(
    27,
    "inf_gradient",
    promise="as row 26",
    injection="the gradients of step 8 are infinite, the loss is not",
)
def inf_gradient(program: Program) -> str:
    return check_policies(program, Fault(LOSS, "infinite gradient", nth=8, training=True))


@row(
    28,
    "oom_fallback",
    promise="the batch is repeated in parts, down to one image; weights within 1e-5",
    injection="out-of-memory with more than 3 of 8 images, and with more than 1",
    quick=True,
    guard=Guard("oom.policy=split", words=("oom.policy=stop",)),
)
def oom_fallback(program: Program) -> str:
    largest = 0.0
    for fits in (3, 1):
        run = f"fits{fits}"
        done = program.train(little_memory(fits), run=run, keep_batchnorm=True)
        check(done.code == 0, f"with room for {fits} images: {done.end()}")
        largest = max(largest, distance(program, run, keep_batchnorm=True))
    check(largest <= 1e-5, f"weights differ by {largest:.0e}")
    return f"finished, weights differ by {largest:.0e}"


@row(
    29,
    "oom_at_one",
    promise="a message of one screen, an exit code of its own (71 here)",
    injection="out-of-memory with a single image",
)
def oom_at_one(program: Program) -> str:
    done = program.train(little_memory(0))
    if isinstance(program, Project):
        program.check_error(done, 71, "single")
    lines = len(done.err.strip().splitlines())
    check(lines <= 15, f"{lines} lines")
    return f"{lines} lines, exit code {done.code}"
